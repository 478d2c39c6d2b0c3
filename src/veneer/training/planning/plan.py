"""The plan of a run: what it will hold in memory while it trains, judges and saves, and how long it will take. Made before it begins.

    peak = max(what loading took, training, judging, saving)          all of them resident memory of the whole process

Training and judging are measured on passes of the run itself (``probe.py``); saving is reckoned: the state that is written, a private
copy of it, and the bytes that go to the disk. A run whose peak does not fit into what the process may still take is refused, with
every single change that would make it fit.

Boundary: one process on one machine; memory that others take meanwhile is not foreseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch

from veneer.checkpoints import attach
from veneer.config import TrainOptions
from veneer.data.example import Example
from veneer.errors import MemoryPlanError
from veneer.models.fast_modules import fuse
from veneer.models.flat import FlatRunner
from veneer.models.load import Base, load_base
from veneer.training import process_memory as memory
from veneer.training.acceleration import natively
from veneer.training.activation_checkpointing import layers_of, recomputed
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.planning import workload as forecast
from veneer.training.planning.packing import choose
from veneer.training.planning.profile import Measured, Probe, Rung, adapter_bytes
from veneer.training.run.console import duration
from veneer.training.run.jobs import expand
from veneer.training.run.parent_adapters import build_on
from veneer.training.run.setup import context_of, gather_all, make_job

_LOOKS = 10
"""Times that a run is judged where it does not say."""
_GB = 1e9


@dataclass(frozen=True)
class Plan:
    """Bytes of resident memory at the peak of each part of a run, and seconds.

    startup: so far. free: what the process may hold in all, None where nothing tells. tokens: of the run's largest pass.
    seconds_per_step: of a round in which every job takes its step. seconds: of the whole run, judging included.
    recompute: with activation checkpointing. extrapolated: whether the largest pass was too large to be tried.
    """

    startup: int
    training: int
    evaluation: int
    saving: int
    free: int | None
    seconds_per_step: float
    seconds: float
    steps: int
    tokens: int
    recompute: bool
    extrapolated: bool

    @property
    def peak(self) -> int:
        """The most that the process will hold."""
        return max(self.startup, self.training, self.evaluation, self.saving)

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.free is None or self.peak <= self.free

    def lines(self) -> list[str]:
        """The plan in two lines."""
        held = "" if self.free is None else f", of {gigabytes(self.free)} that there are"
        again = ", with activation checkpointing" if self.recompute else ""
        return [
            f"plan: {gigabytes(self.peak)} of memory at the peak{held} (training {gigabytes(self.training)}{again}, judging "
            f"{gigabytes(self.evaluation)}, saving {gigabytes(self.saving)}); the largest pass has {self.tokens:,} tokens",
            f"plan: {_time(self.seconds_per_step)} a step, about {duration(self.seconds)} for {self.steps:,} steps",
        ]

    def figures(self) -> dict[str, Any]:
        """All of it by name, for JSON."""
        return {"peak": self.peak, **asdict(self), "fits": self.fits}

    @classmethod
    def recorded(cls, facts: Mapping[str, Any]) -> list[str]:
        """The lines of the plan that a run's facts hold, if they hold one."""
        found = facts.get("plan") or {}
        known = {field.name for field in fields(cls)}
        return cls(**{key: found[key] for key in known}).lines() if known <= set(found) else []


def plan(config: TrainOptions | Mapping[str, Any], *, base: Base | None = None) -> tuple[Plan, list[str]]:
    """Plan a run without starting it: nothing is written.

    base: a base in memory, taken instead of loading the one that the options name.
    Returns the plan and, where it does not fit, what would. Raises what `train` raises before its first step.
    """
    options = config if isinstance(config, TrainOptions) else TrainOptions(**config)
    jobs = expand(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = base or load_base(options.base, dtype=options.dtype, revision=options.revision)
    with natively(options.compile, next(loaded.model.parameters()).device, lambda line: None):
        return _plan(options, jobs, loaded)


def _plan(options: TrainOptions, jobs: Mapping[str, TrainOptions], loaded: Base) -> tuple[Plan, list[str]]:
    material = gather_all(jobs, loaded, context_of(loaded))
    bank = attach(loaded.model)
    fuse(loaded.model)
    try:
        made = [make_job(name, own, loaded, bank, material[name]) for name, own in jobs.items()]
        build_on(made, bank)
        stepper = Stepper(FlatRunner(loaded.model), bank, {job.name: job.route for job in made if job.route})
        share = choose(options, stepper, made).share
        planner = Planner(options, stepper, made, base=loaded, share=share, thorough=True)
        found = planner.make()
        return found, [] if found.fits else planner.remedies(found)
    finally:
        bank.detach()


class Planner:
    """Makes the plan of a run whose jobs are set up and have not begun."""

    def __init__(
        self,
        options: TrainOptions,
        stepper: Stepper,
        jobs: Sequence[Job],
        *,
        base: Base,
        share: int,
        thorough: bool = False,
    ) -> None:
        """thorough: measure, whatever it costs."""
        self.options = options
        self.stepper = stepper
        self.jobs = list(jobs)
        self.base = base
        self.share = share
        self.thorough = thorough
        self._measured: Measured | None = None

    def make(self) -> Plan:
        """The plan. Where activation checkpointing is left to it, it is on only if the run does not fit without."""
        wanted = self.options.activation_checkpointing
        found, self._measured = self._plan(recompute=wanted is True)
        if wanted == "auto" and not found.fits and layers_of(self.stepper.runner.model):
            found, self._measured = self._plan(recompute=True)
        return found

    def require(self, found: Plan) -> None:
        """Raise MemoryPlanError, with what would fit, unless the plan does."""
        if found.fits:
            return
        raise MemoryPlanError(
            f"the run needs {gigabytes(found.peak)} of memory at its peak (training {gigabytes(found.training)}, judging "
            f"{gigabytes(found.evaluation)}, saving {gigabytes(found.saving)}), and the process may hold {gigabytes(found.free or 0)}; "
            f"{self._said(found)}; --no-plan starts it as it is"
        )

    def _said(self, found: Plan) -> str:
        remedies = self.remedies(found)
        return (
            f"it would fit with {', or '.join(remedies)}"
            if remedies
            else "no single option makes it fit: take a smaller base"
        )

    def remedies(self, found: Plan) -> list[str]:
        """Single changes, each of which makes the run fit by the same reckoning."""
        free, seen = found.free, self._measured
        assert free is not None and seen is not None
        remedies = []
        if found.saving <= free and found.startup <= free:
            remedies += self._fewer_tokens(seen, free)
        if not found.recompute and layers_of(self.stepper.runner.model) and self._plan(recompute=True)[0].fits:
            remedies.append("--activation-checkpointing true")
        tensors = self._state_bytes() + sum(map(adapter_bytes, self.jobs))
        rank = max(job.options.r for job in self.jobs)
        fitting = [r for r in (64, 32, 16, 8, 4, 2, 1) if r < rank and found.peak - tensors * (1 - r / rank) <= free]
        remedies += [f"--r {fitting[0]}"] if fitting else []
        if self.base.dtype == torch.float32:
            weights = sum(p.numel() * p.element_size() for p in self.base.model.parameters())
            if found.peak - (weights + max(0, found.training - seen.start - tensors)) / 2 <= free:
                remedies.append("--dtype bfloat16")
        return remedies

    def _fewer_tokens(self, seen: Measured, free: int) -> list[str]:
        """The largest ``tokens_per_pass`` that fits, if no example is longer than that, or else the longest example that fits."""
        longest = max([forecast.longest(self.jobs), *map(len, self._judged())])
        for tokens in _round_numbers(self.options.tokens_per_pass):
            both = _at(seen.training, tokens, 0, seen.start), _at(seen.judging, tokens, 0, seen.start)
            if max(both) <= free:
                if tokens >= longest:
                    return [f"--tokens-per-pass {tokens}"]
                return [f"--max-length {tokens} --tokens-per-pass {tokens}"]
        return []

    def _judged(self) -> list[Example]:
        return [example for job in self.jobs for example in (*job.held_out, *job.general)]

    def _plan(self, *, recompute: bool) -> tuple[Plan, Measured]:
        free = memory.free()
        limit = None if free is None else memory.resident() + free
        startup = memory.highest()
        with recomputed(self.stepper.runner.model, recompute):
            seen = Probe(
                self.stepper,
                self.jobs,
                budget=self.options.tokens_per_pass,
                share=self.share,
                judged=self._judged(),
                limit=limit,
                thorough=self.thorough,
            ).measure()
        per_step = _seconds_per_round(seen, forecast.tokens_of_round(self.jobs))
        steps = max(job.steps for job in self.jobs)
        found = Plan(
            startup=startup,
            training=max(_at(seen.training, seen.tokens, seen.squares, seen.start), seen.held),
            evaluation=_at(seen.judging, seen.judged, 0, seen.start),
            saving=seen.start + 2 * self._state_bytes(),
            free=limit,
            seconds_per_step=per_step,
            seconds=steps * per_step + self._judging_seconds(seen),
            steps=steps,
            tokens=seen.tokens,
            recompute=recompute,
            extrapolated=seen.training[-1].tokens < seen.tokens,
        )
        return found, seen

    def _state_bytes(self) -> int:
        """What a checkpoint holds: every adapter's tensors and its optimizer's moments."""
        return sum(adapter_bytes(job) * (3 if job.options.optimizer == "adamw" else 1) for job in self.jobs)

    def _judging_seconds(self, seen: Measured) -> float:
        if not seen.judging:
            return 0.0
        pace = seen.judging[-1].seconds / seen.judging[-1].tokens
        looks = [1 + job.steps // (job.options.eval_every or max(1, job.steps // _LOOKS)) for job in self.jobs]
        tokens = [sum(map(len, [*job.held_out, *job.general])) for job in self.jobs]
        return pace * sum(count * number for count, number in zip(looks, tokens, strict=True))


def _at(rungs: Sequence[Rung], tokens: int, squares: int, start: int) -> int:
    """The highest mark of a pass of so many tokens: what was measured where that was run, else the line through the last two passes.

    squares: sum of the segments' squared lengths; where segments are longer than those of any pass that was run, a parabola takes the
    line's place.
    """
    if not rungs:
        return start
    last = rungs[-1]
    if len(rungs) == 1:
        return start + round((last.bytes - start) * max(0.0, tokens / last.tokens))
    for low, high in pairwise(rungs):
        if tokens <= high.tokens:
            return round(low.bytes + _slope(low, high) * (tokens - low.tokens))
    line = last.bytes + _slope(rungs[-2], last) * (tokens - last.tokens)
    longer = squares / max(1, tokens) > 1.5 * max(rung.squares / rung.tokens for rung in rungs)
    if len(rungs) >= 3 and longer:
        first, middle, _ = rungs[-3:]
        bend = (_slope(middle, last) - _slope(first, middle)) / (last.tokens - first.tokens)
        line += max(0.0, bend) * (tokens - middle.tokens) * (tokens - last.tokens)
    return round(line)


def _slope(low: Rung, high: Rung) -> float:
    return max(0.0, (high.bytes - low.bytes) / max(1, high.tokens - low.tokens))


def _seconds_per_round(seen: Measured, tokens: float) -> float:
    """Expected time of a round: from whole rounds but the first, or else from the largest pass that was run."""
    if seen.rounds:
        counted = seen.rounds[1:] or seen.rounds
        return sum(seconds for _, seconds in counted) / sum(count for count, _ in counted) * tokens
    last = seen.training[-1]
    fixed = 0.0
    if len(seen.training) > 1:
        before = seen.training[-2]
        slope = (last.seconds - before.seconds) / max(1, last.tokens - before.tokens)
        fixed = min(0.25 * last.seconds, max(0.0, last.seconds - slope * last.tokens))
    passes = max(1.0, tokens / seen.tokens)
    return passes * fixed + (last.seconds - fixed) / last.tokens * tokens + seen.update


def _round_numbers(below: int) -> list[int]:
    """Token counts to propose, the largest first."""
    found = [step * 2**power for power in range(3, 20) for step in (4, 5, 6, 7)]
    return [number for number in reversed(found) if number < below and number >= 32]


def gigabytes(count: int) -> str:
    """ "2.94 GB"."""
    return f"{count / _GB:.2f} GB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds)
