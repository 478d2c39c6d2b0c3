"""Whether rows of several jobs share passes through the base: measured on the run's own first round, before its first step.

A pass of few tokens reads all of the base's weights for little work, so small pieces of several jobs go faster together; large ones
gain nothing, and hold several jobs' activations at once. Where the one turns into the other is the machine's affair. So the first
round's small pieces are run in turn and in shared passes of a few sizes, one after the other, and the quickest size is taken. Nothing
of that is left behind (``probe.untouched``). What was chosen is written down before the first step and holds when the run goes on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from veneer.config import TrainOptions
from veneer.data.batch import make_batch
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.planning import workload as forecast
from veneer.training.planning.profile import untouched
from veneer.training.planning.workload import Pass

SHARE = 512
"""Tokens that shared passes hold where nothing is measured: see docs/log.md for the times that it rests on."""
_SIZES = (256, 512, 1024)
_REPEATS, _SECONDS = 3, 10.0
_LEAST_ROUNDS = 40
"""Rounds of a run below which measuring would cost more than it can bring."""
_GAIN = 1.03
"""Sharing must be so much quicker to be taken: it holds more in memory."""


@dataclass(frozen=True)
class Sharing:
    """share: most tokens of a shared pass, 0 where jobs take turns. reason: why, in words. seconds: of a round's small pieces, by the
    size of shared passes, where that was measured.
    """

    share: int
    reason: str
    seconds: Mapping[str, float]

    def line(self) -> str:
        """The choice as a run prints it."""
        if not self.share:
            return f"jobs take turns on the base ({self.reason})"
        return (
            f"rows of several jobs share passes of up to {self.share} tokens; longer pieces take turns ({self.reason})"
        )

    def facts(self) -> dict[str, Any]:
        """What is written down of it."""
        return {"share": self.share, "sharing": asdict(self)}

    @classmethod
    def recorded(cls, facts: Mapping[str, Any]) -> Sharing:
        """The choice that a run's facts hold."""
        known = facts.get("sharing")
        return cls(**known) if known else cls(int(facts.get("share", 0)), "as the run began", {})


def choose(options: TrainOptions, stepper: Stepper, jobs: Sequence[Job]) -> Sharing:
    """How jobs that have not begun share passes."""
    if len(jobs) < 2:
        return Sharing(0, "one job", {})
    if options.share != "auto":
        return Sharing(int(options.share), "as asked for", {})
    if not options.plan or max(job.steps for job in jobs) < _LEAST_ROUNDS:
        return Sharing(SHARE, "not measured", {})
    plans = _plans(options, jobs)
    if len(plans) == 1:
        return Sharing(0, "no two of their pieces are small enough to share a pass", {})
    try:
        with untouched(stepper.bank, jobs):
            seconds = _measured(stepper, plans)
    except Exception as error:  # the run itself tells what is wrong with it, and of which job
        return Sharing(SHARE, f"not measured: {error}", {})
    best = min((size for size in seconds if size), key=lambda size: seconds[size])
    gain = seconds[0] / seconds[best]
    told = {str(size): round(value, 4) for size, value in seconds.items()}
    if gain < _GAIN:
        return Sharing(0, f"measured: shared passes take {1 / gain:.2f} times as long", told)
    return Sharing(best, f"measured: {gain:.2f} times as fast as in turn", told)


def _plans(options: TrainOptions, jobs: Sequence[Job]) -> dict[int, list[Pass]]:
    """The passes of the first round by the size of shared passes, 0 in turn; a size that changes nothing is left out, and so are
    passes that are the same in all."""
    found: dict[int, list[Pass]] = {}
    for size in (0, *(size for size in _SIZES if size <= max(SHARE, options.tokens_per_pass))):
        passes = forecast.rounds(jobs, options.tokens_per_pass, size)[0]
        if passes not in found.values():
            found[size] = passes
    common = [one for one in found[0] if all(one in passes for passes in found.values())]
    return {size: [one for one in passes if one not in common] for size, passes in found.items()}


def _measured(stepper: Stepper, plans: Mapping[int, list[Pass]]) -> dict[int, float]:
    """Median seconds of each plan, run in turns. The first run of each warms up, and tells how often it can be repeated."""
    first = {size: _seconds(stepper, passes) for size, passes in plans.items()}
    repeats = max(1, min(_REPEATS, int(_SECONDS / max(1e-9, sum(first.values())))))
    times: dict[int, list[float]] = {size: [] for size in plans}
    for _ in range(repeats):
        for size, passes in plans.items():
            times[size].append(_seconds(stepper, passes))
    return {size: statistics.median(own) for size, own in times.items()}


def _seconds(stepper: Stepper, passes: Sequence[Pass]) -> float:
    batches = []
    for one in passes:
        rows = forecast.rows(one)
        batches.append(make_batch([example for _, example in rows], [job.name for job, _ in rows]))
    began = time.perf_counter()
    for batch in batches:
        stepper.forward_backward(batch)
    return time.perf_counter() - began
