"""The memory and time that a run will need, estimated before it begins.

    peak = max(startup, training, evaluation, saving)          resident memory of the whole process; on a GPU, memory of the device

Training and evaluation are measured on passes of the run (``profile.py``). Saving is computed: the state, a private copy of it, and the
bytes written. A run whose peak exceeds what the process may use is refused, with each single option that would make it fit.

Boundary: one process on one machine. Memory that other processes take during the run is not foreseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from veneer._terminal import counted
from veneer.adapters.methods import LOW_RANK
from veneer.config import TrainOptions
from veneer.data.example import Example
from veneer.errors import MemoryPlanError
from veneer.models.devices import device_of
from veneer.models.load import Base
from veneer.models.quantized.size import quantized_saving
from veneer.training.activation_checkpointing import activation_checkpointing, layers_of
from veneer.training.device_memory import memory_of
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.planning.fitting import best, settings, shape_of
from veneer.training.planning.profile import Profile, Profiler, adapter_bytes, memory_at
from veneer.training.planning.workload import lengths_of, tokens_per_round
from veneer.training.run.console import duration


@dataclass(frozen=True)
class TrainingPlan:
    """Peak resident memory of each part of a run in bytes, and its time. The fields are stored in ``run.json`` by these names.

    free: bytes that the process may use in all, None if nothing reports it. seconds_per_step: of a round in which every job takes its
    step. seconds: of the whole run with its evaluations. tokens: of the largest pass. recompute: with activation checkpointing.
    extrapolated: the largest pass was not run. device: the GPU whose memory this is, "" for the machine's own.
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
    device: str = ""

    @property
    def peak(self) -> int:
        """The peak of all parts."""
        return max(self.startup, self.training, self.evaluation, self.saving)

    @property
    def fits(self) -> bool:
        """True if the process may use that much."""
        return self.free is None or self.peak <= self.free

    @property
    def parts(self) -> str:
        """The peaks in words."""
        again = " with activation checkpointing" if self.recompute else ""
        return f"training {_gb(self.training)}{again}, evaluation {_gb(self.evaluation)}, saving {_gb(self.saving)}"

    def lines(self) -> list[str]:
        """The plan in two lines."""
        available = "" if self.free is None else f" of {_gb(self.free)} available"
        available += f" on {self.device}" if self.device else ""
        step = f"{self.seconds_per_step:.2f} s" if self.seconds_per_step < 10 else duration(self.seconds_per_step)
        return [
            f"plan: peak memory {_gb(self.peak)}{available} ({self.parts}); the largest pass has {self.tokens:,} tokens",
            f"plan: {step} per step, about {duration(self.seconds)} for {counted(self.steps, 'step')}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """All values by name, for JSON."""
        return {"peak": self.peak, **asdict(self), "fits": self.fits}

    @classmethod
    def stored_lines(cls, manifest: Mapping[str, Any], steps: int) -> list[str]:
        """The lines of the plan in a run's manifest, for the ``steps`` that are left; [] if it has none."""
        found = manifest.get("plan") or {}
        names = {field.name for field in fields(cls)}
        known = {name: found[name] for name in names & set(found)}
        if not names - {"device"} <= set(known):
            return []
        plan = cls(**known)
        return replace(plan, steps=steps, seconds=plan.seconds * steps / plan.steps).lines()


class Planner:
    """Plans a run whose jobs have not begun."""

    def __init__(
        self,
        options: TrainOptions,
        stepper: Stepper,
        jobs: Sequence[Job],
        *,
        base: Base,
        tokens_per_shared_pass: int,
        thorough: bool = False,
    ) -> None:
        """``thorough`` measures whatever its time."""
        self.options = options
        self.stepper = stepper
        self.jobs = list(jobs)
        self.held_out: list[Example] = [e for job in jobs for e in (*job.held_out, *job.general)]
        self.base = base
        self.tokens_per_shared_pass = tokens_per_shared_pass
        self.thorough = thorough
        self.memory = memory_of(device_of(base.model))
        self._profile: Profile | None = None

    def make(self) -> TrainingPlan:
        """Make the plan. ``activation_checkpointing: auto`` is on only if the run does not fit without it."""
        asked = self.options.activation_checkpointing
        plan, self._profile = self._make(recompute=asked is True)
        if asked == "auto" and not plan.fits and layers_of(self.base.model):
            plan, self._profile = self._make(recompute=True)
        return plan

    def require(self, plan: TrainingPlan) -> None:
        """Raise MemoryPlanError if the plan does not fit, with the options that would."""
        if plan.fits:
            return
        remedies = ", or ".join(self.remedies(plan))
        on = f" on {plan.device}" if plan.device else ""
        advice = f"it would fit with {remedies}" if remedies else self._settings(plan.free or 0)
        raise MemoryPlanError(
            f"the run needs {_gb(plan.peak)} of memory at its peak{on} ({plan.parts}), and the process may use {_gb(plan.free or 0)}; "
            f"{advice}; --no-plan starts it anyway"
        )

    def _settings(self, free: int) -> str:
        """The options that fit together, by the estimate from the base's config."""
        command = f"veneer plan --base {self.base.name} --memory {free / 1e9:.1f}GB"
        method, folder, row = self.options.method, self.base.path, None
        if method in LOW_RANK and folder is not None and (folder / "config.json").is_file():
            ranks = sorted({min(r, job.options.r) for job in self.jobs for r in (8, 16, 64)})
            row = best(settings(shape_of(folder, method), free, method, ranks))
        if row is None:
            return f"no single option makes it fit; {command} shows which settings fit"
        return (
            f"no single option makes it fit, these should together: {' '.join(row.flags())} (the best row of {command})"
        )

    def remedies(self, plan: TrainingPlan) -> list[str]:
        """Single options with which a run that does not fit would fit."""
        free, profile = plan.free, self._profile
        assert free is not None and profile is not None
        remedies = []
        if max(plan.saving, plan.startup) <= free:
            remedies += self._fewer_tokens(profile, free)
        if not plan.recompute and layers_of(self.base.model) and self._make(recompute=True)[0].fits:
            remedies.append("--activation-checkpointing true")
        tensors = self._state_bytes() + sum(map(adapter_bytes, self.jobs))
        rank = max(job.options.r for job in self.jobs)
        ranks = [r for r in (64, 32, 16, 8, 4, 2, 1) if r < rank and plan.peak - tensors * (1 - r / rank) <= free]
        remedies += [f"--r {ranks[0]}"] if ranks else []
        if self.base.dtype == torch.float32:
            weights = sum(p.numel() * p.element_size() for p in self.base.model.parameters())
            if plan.peak - (weights + max(0, plan.training - profile.start - tensors)) / 2 <= free:
                remedies.append("--dtype bfloat16")
        saved = quantized_saving(self.base.model)
        if saved and plan.peak - saved <= free:
            remedies.append("--quantize nf4")
        return remedies

    def _fewer_tokens(self, profile: Profile, free: int) -> list[str]:
        """The largest ``tokens_per_pass`` that fits, with a ``max_length`` if there are longer examples."""
        longest = max([*map(len, self.held_out), *(n for job in self.jobs for n in lengths_of(job.examples))])
        round_numbers = (step * 2**power for power in range(19, 2, -1) for step in (7, 6, 5, 4))
        for tokens in (n for n in round_numbers if 32 <= n < self.options.tokens_per_pass):
            parts = profile.training, profile.evaluation
            if max(memory_at(part, tokens, 0, profile.start) for part in parts) <= free:
                shorter = "" if tokens >= longest else f"--max-length {tokens} "
                return [f"{shorter}--tokens-per-pass {tokens}"]
        return []

    def _make(self, *, recompute: bool) -> tuple[TrainingPlan, Profile]:
        startup, left = self.memory.highest(), self.memory.free()
        limit = None if left is None else self.memory.used() + left
        with activation_checkpointing(self.base.model, recompute):
            profile = Profiler(
                self.stepper,
                self.jobs,
                tokens_per_pass=self.options.tokens_per_pass,
                tokens_per_shared_pass=self.tokens_per_shared_pass,
                held_out=self.held_out,
                limit=limit,
                thorough=self.thorough,
                memory=self.memory,
            ).measure()
        seconds_per_step = profile.seconds_of_round(sum(map(tokens_per_round, self.jobs)))
        steps = max(job.steps for job in self.jobs)
        plan = TrainingPlan(
            startup=startup,
            training=profile.training_peak,
            evaluation=profile.evaluation_peak,
            saving=self.memory.saving(profile.start, self._state_bytes()),
            free=limit,
            seconds_per_step=seconds_per_step,
            seconds=steps * seconds_per_step + self._evaluation_seconds(profile),
            steps=steps,
            tokens=profile.tokens,
            recompute=recompute,
            extrapolated=profile.training[-1].tokens < profile.tokens,
            device=self.memory.name,
        )
        return plan, profile

    def _state_bytes(self) -> int:
        """Bytes of a checkpoint: the tensors of all adapters and the moments of their optimizers."""
        return sum(adapter_bytes(job) * (3 if job.options.optimizer == "adamw" else 1) for job in self.jobs)

    def _evaluation_seconds(self, profile: Profile) -> float:
        if not profile.evaluation:
            return 0.0
        pace = profile.evaluation[-1].seconds / profile.evaluation[-1].tokens
        tokens = [sum(map(len, (*job.held_out, *job.general))) for job in self.jobs]
        counts = [1 + job.steps // job.eval_every for job in self.jobs]
        return pace * sum(count * number for count, number in zip(counts, tokens, strict=True))


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
