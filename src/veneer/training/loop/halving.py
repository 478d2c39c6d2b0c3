"""Successive halving: at each rung the worse half of a sweep's jobs stops, and its time goes to the others.

With n jobs there are ceil(log2 n) rungs, at S/2^k, ..., S/4, S/2 of the S steps: eight jobs are four after an eighth, two after a
quarter, one after half (Jamieson and Talwalkar, 2016, arXiv 1502.07943). Jobs are compared by the held-out loss that each had at the
very step of the rung, so what is stopped does not depend on who came there first.

What a rung does is a function of the jobs' own histories; nothing is remembered here, and a resumed run decides as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from veneer.errors import ConfigError
from veneer.training.loop.job import Job, State
from veneer.training.loop.trainer import Request

CODE = "halving"


class Halving:
    """The rungs of one sweep."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Jobs get looks at their held-out examples at every rung.

        Raises ConfigError where jobs cannot be compared: fewer than two, without held-out examples, or with different numbers of steps.
        """
        if len(jobs) < 2:
            raise ConfigError("halving compares jobs, and this run has one; sweep an option: --r 4,16,64")
        without = [job.name for job in jobs if not job.held_out]
        if without:
            raise ConfigError(
                f"halving compares jobs by their held-out loss, and {without[0]} has no held-out examples; give valid or valid_fraction"
            )
        if (
            len({job.steps for job in jobs}) > 1
            or len({tuple(example.ids for example in job.held_out) for job in jobs}) > 1
        ):
            raise ConfigError("halving compares jobs of the same number of steps on the same held-out examples")
        steps, count = jobs[0].steps, len(jobs)
        rungs = math.ceil(math.log2(count))
        self.rungs = {steps >> k: math.ceil(count / 2 ** (rungs - k + 1)) for k in range(rungs, 0, -1) if steps >> k}
        """Step of each rung -> how many jobs go on from it."""
        for job in jobs:
            job.looks = frozenset(self.rungs)

    def losers(self, jobs: Sequence[Job]) -> list[Request]:
        """The jobs to stop now."""
        found: list[Request] = []
        for step, keep in self.rungs.items():
            there = {job.name: loss for job in jobs for at, loss in job.progress.evaluations if at == step}
            stopped = {job.name for job in jobs if job.code == CODE} | {request.job for request in found}
            contest = [
                job for job in jobs if job.name not in stopped and job.state not in (State.FAILED, State.CANCELLED)
            ]
            if any(not job.over and job.name not in there for job in contest):
                break  # somebody is still on the way
            ranked = sorted(contest, key=lambda job: _rank(there.get(job.name)))
            for place, job in enumerate(ranked[keep:], keep + 1):
                if not job.over:
                    loss = there[job.name]
                    reason = f"stopped at step {step}: held-out loss {loss:.4f}, number {place} of {len(ranked)}"
                    found.append(Request(job.name, "cancel", CODE, reason))
        return found


def _rank(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss
