"""Successive halving: at each rung the worse half of a sweep's jobs is stopped (Jamieson and Talwalkar, 2016, arXiv 1502.07943).

n jobs have ceil(log2 n) rungs, at S/2^k, ..., S/4, S/2 of the S steps: of eight jobs four continue after an eighth, two after a quarter,
one after half. Jobs are compared by the held-out loss that each had at the step of the rung, whenever it got there.

The decision depends only on the evaluations that jobs have recorded, so a resumed run decides in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from veneer.errors import ConfigError
from veneer.training.loop.job import Job, JobState
from veneer.training.loop.trainer import Request

CODE = "halving"


class Halving:
    """The rungs of one sweep."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Set the rungs, and have every job evaluated at each of them.

        Raises ConfigError if jobs cannot be compared: fewer than two, no held-out examples, or different steps or held-out examples.
        """
        if len(jobs) < 2:
            raise ConfigError("halving compares jobs, and this run has one; sweep an option: --r 4,16,64")
        without = [job.name for job in jobs if not job.held_out]
        if without:
            raise ConfigError(
                f"halving compares held-out losses, and {without[0]} has no held-out examples; give valid or valid_fraction"
            )
        if len({(job.steps, tuple(example.ids for example in job.held_out)) for job in jobs}) > 1:
            raise ConfigError(
                "halving compares jobs with equal steps and held-out examples; give every job the same steps and valid"
            )
        steps, count = jobs[0].steps, len(jobs)
        rungs = math.ceil(math.log2(count))
        self.rungs = {steps >> k: math.ceil(count / 2 ** (rungs - k + 1)) for k in range(rungs, 0, -1) if steps >> k}
        """Step of each rung -> number of jobs that continue."""
        for job in jobs:
            job.extra_evaluations = frozenset(self.rungs)

    def losers(self, jobs: Sequence[Job]) -> list[Request]:
        """Requests to cancel the jobs that lost at a rung that all have reached."""
        found: list[Request] = []
        for step, keep in self.rungs.items():
            losses = {job.name: loss for job in jobs for at, loss in job.progress.evaluations if at == step}
            stopped = {job.name for job in jobs if job.code == CODE} | {request.job for request in found}
            contest = [
                job
                for job in jobs
                if job.name not in stopped and job.state not in (JobState.FAILED, JobState.CANCELLED)
            ]
            if any(not job.over and job.name not in losses for job in contest):
                break  # a job has not reached this rung yet
            ranked = sorted(contest, key=lambda job: _rank(losses.get(job.name)))
            for place, job in enumerate(ranked[keep:], keep + 1):
                if not job.over:
                    loss = losses[job.name]
                    reason = f"stopped at step {step}: held-out loss {loss:.4f}, number {place} of {len(ranked)}"
                    found.append(Request(job.name, "cancel", CODE, reason))
        return found


def _rank(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss
