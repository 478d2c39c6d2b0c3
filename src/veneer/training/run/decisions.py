"""Decisions made from measurements before the first step: forms of operations, shared passes, the memory and time plan, checkpointing.

``plan(config)`` makes the plan of a run without starting it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from veneer.config import TrainOptions
from veneer.kernels.forms import Forms
from veneer.models.load import Base
from veneer.training.planning.gpu_forms import choose_forms
from veneer.training.planning.packing import choose_packing
from veneer.training.planning.plan import Planner, TrainingPlan
from veneer.training.run.jobs import expand
from veneer.training.run.setup import Setup, set_up


def decide(setup: Setup, say: Callable[[str], None]) -> dict[str, Any]:
    """The decisions as the manifest stores them. Raises MemoryPlanError if the run does not fit in memory."""
    options = setup.options
    chosen = setup.stepper.forms = _forms(setup)
    divided = setup.shards is not None or options.sequence_parallel > 1
    if options.plan and divided:
        say(
            "no plan: it would be that of a process with the whole base and whole texts; give activation_checkpointing if memory is short"
        )
    packing = choose_packing(options, setup.stepper, setup.jobs)
    plan = _plan(setup, packing.tokens, say) if options.plan and not divided else None
    planned = {} if plan is None else {"plan": plan.as_dict(), "recompute": plan.recompute}
    forms = {} if chosen == Forms() else {"forms": asdict(chosen)}
    return {**packing.as_dict(), **planned, **forms}


def _forms(setup: Setup) -> Forms:
    """The forms of operations on the run's device."""
    options, steps = setup.options, max(job.steps for job in setup.jobs)
    return choose_forms(setup.base.model, tokens=options.tokens_per_pass, steps=steps, option=options.compile)


def stored_forms(manifest: Mapping[str, Any]) -> Forms:
    """The forms that a run began with, by its manifest."""
    return Forms(**manifest.get("forms", {}))


def _plan(setup: Setup, tokens_per_shared_pass: int, say: Callable[[str], None]) -> TrainingPlan | None:
    planner = Planner(
        setup.options, setup.stepper, setup.jobs, base=setup.base, tokens_per_shared_pass=tokens_per_shared_pass
    )
    try:
        plan = planner.make()
    except Exception as error:  # the run itself will report the problem, and the job that has it
        say(f"no plan: {error}")
        return None
    planner.require(plan)
    return plan


def plan(config: TrainOptions | Mapping[str, Any], *, base: Base | None = None) -> tuple[TrainingPlan, list[str]]:
    """Plan a run without starting it. Nothing is written.

    Args:
        config: the options of the run.
        base: a base in memory, in place of the one that the options name.

    Returns:
        The plan and, if the run does not fit in memory, the single options with which it would.

    Raises:
        VeneerError: whatever `train` raises before its first step.
    """
    options = config if isinstance(config, TrainOptions) else TrainOptions(**config)
    with set_up(options, expand(options), base, lambda line: None) as setup:
        setup.stepper.forms = _forms(setup)
        tokens = choose_packing(options, setup.stepper, setup.jobs).tokens
        planner = Planner(
            options, setup.stepper, setup.jobs, base=setup.base, tokens_per_shared_pass=tokens, thorough=True
        )
        found = planner.make()
        return found, [] if found.fits else planner.remedies(found)
