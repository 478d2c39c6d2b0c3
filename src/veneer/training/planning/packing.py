"""Choose whether several jobs share passes, by measuring the run's first round before its first step.

A pass of few tokens reads all base weights for little work, so small pieces of several jobs run faster together. Large ones gain nothing
and hold the activations of several jobs at once. The limit depends on the machine, so the small pieces of the first round are run in turn
and in shared passes of a few sizes, and the fastest is taken. Measuring leaves no trace (``profile.untouched``). The choice is stored
before the first step and holds when the run resumes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.config import TrainOptions
from veneer.data.batch import make_batch
from veneer.models.devices import device_of, wait_for
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.planning.profile import untouched
from veneer.training.planning.workload import Pass, examples_of, planned_rounds

USUAL = 512
"""Tokens of shared passes if nothing is measured; docs/log/mixed_batches.md has the times behind it."""
_SIZES = (256, 512, 1024)
_REPEATS, _SECONDS = 3, 10.0
_LEAST_ROUNDS = 40
"""Rounds of a run below which measuring costs more than it can gain."""
_GAIN = 1.03
"""Speed-up from which passes are shared, since they need more memory."""


@dataclass(frozen=True)
class Packing:
    """Maximum tokens of a shared pass (0: jobs run in turn), the reason, and the measured seconds of a round's small pieces by size."""

    tokens: int
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The choice in words."""
        if not self.tokens:
            return f"jobs run in turn ({self.reason})"
        return f"jobs share passes of up to {self.tokens} tokens; longer pieces run in turn ({self.reason})"

    def as_dict(self) -> dict[str, Any]:
        """The entries of the manifest."""
        return {
            "share": self.tokens,
            "sharing": {"share": self.tokens, "reason": self.reason, "seconds": dict(self.seconds)},
        }

    @classmethod
    def stored(cls, manifest: Mapping[str, Any]) -> Packing:
        """The choice in a run's manifest."""
        found = manifest.get("sharing") or {}
        return cls(int(manifest["share"]), found.get("reason", "as the run began"), found.get("seconds", {}))


def choose_packing(options: TrainOptions, stepper: Stepper, jobs: Sequence[Job]) -> Packing:
    """Choose how jobs that have not begun share passes."""
    if len(jobs) < 2:
        return Packing(0, "one job")
    if options.tokens_per_shared_pass != "auto":
        return Packing(int(options.tokens_per_shared_pass), "as requested")
    if not options.plan or stepper.shards is not None or max(job.steps for job in jobs) < _LEAST_ROUNDS:
        return Packing(USUAL, "not measured")
    candidates = _candidates(options, jobs)
    if len(candidates) == 1:
        return Packing(0, "no two of their pieces are small enough to share a pass")
    try:
        with untouched(stepper, jobs):
            seconds = _measured(stepper, candidates)
    except Exception as error:  # the run itself will report the problem, and the job that has it
        return Packing(USUAL, f"not measured: {error}")
    best = min((size for size in seconds if size), key=lambda size: seconds[size])
    gain = seconds[0] / seconds[best]
    by_size = {str(size): round(value, 4) for size, value in seconds.items()}
    if gain < _GAIN:
        return Packing(0, f"measured: shared passes take {1 / gain:.2f} times as long", by_size)
    return Packing(best, f"measured: {gain:.2f} times as fast as in turn", by_size)


def _candidates(options: TrainOptions, jobs: Sequence[Job]) -> dict[int, list[Pass]]:
    """The passes of the first round by the size of shared passes, 0 in turn. Sizes that change nothing are left out, and so are passes
    that are the same in all."""
    found: dict[int, list[Pass]] = {}
    for size in (0, *(size for size in _SIZES if size <= max(USUAL, options.tokens_per_pass))):
        passes = planned_rounds(jobs, options.tokens_per_pass, size)[0]
        if passes not in found.values():
            found[size] = passes
    common = [one for one in found[0] if all(one in passes for passes in found.values())]
    return {size: [one for one in passes if one not in common] for size, passes in found.items()}


def _measured(stepper: Stepper, candidates: Mapping[int, list[Pass]]) -> dict[int, float]:
    """Median seconds of each candidate, run alternately. The first runs warm up and set the number of repetitions."""
    first = {size: _seconds(stepper, passes) for size, passes in candidates.items()}
    repeats = max(1, min(_REPEATS, int(_SECONDS / max(1e-9, sum(first.values())))))
    times = [{size: _seconds(stepper, passes) for size, passes in candidates.items()} for _ in range(repeats)]
    return {size: statistics.median(one[size] for one in times) for size in candidates}


def _seconds(stepper: Stepper, passes: Sequence[Pass]) -> float:
    batches = []
    for one in passes:
        rows = examples_of(one)
        batches.append(make_batch([example for _, example in rows], [job.name for job, _ in rows]))
    # on a CPU other programs may take turns with this one, which counts for the clock and not for the work
    device = device_of(stepper.runner.model)
    now = time.process_time if device.type == "cpu" else time.perf_counter
    wait_for(device)
    began = now()
    for batch in batches:
        stepper.forward_backward(batch)
    wait_for(device)
    return now() - began
