"""What a run leaves behind for whoever called it: its folder, and how each job ended.

Boundary: numbers and paths; tables and pictures of them are ``summary.py``'s matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import plain
from veneer.training.loop.job import Job
from veneer.training.run.jobs import SHARED
from veneer.training.run.run_folder import RunFiles

__all__ = ["JobResult", "RunResult", "result_of"]


@dataclass(frozen=True)
class JobResult:
    """How a job ended. ``losses``: (step, held-out loss) of each look. ``changes``: the options in which it differs from its neighbours."""

    name: str
    method: str
    r: int
    learning_rate: float
    state: str
    reason: str
    steps: int
    losses: tuple[tuple[int, float], ...]
    adapter: Path
    best: Path
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind: its folder and its jobs by name."""

    out: Path
    jobs: dict[str, JobResult]

    @property
    def adapter(self) -> Path:
        """The folder of the only (or first) job's last adapter."""
        return next(iter(self.jobs.values())).adapter


def result_of(files: RunFiles, jobs: list[Job]) -> RunResult:
    """The result of a run whose jobs ended, or stand where they are."""
    options = {job.name: plain(job.options) for job in jobs}
    apart = {
        key: None
        for own in options.values()
        for key, value in own.items()
        if key not in (*SHARED, "name") and any(other[key] != value for other in options.values())
    }
    results = {
        job.name: JobResult(
            job.name,
            job.options.method,
            job.options.r,
            job.peak,
            job.state.value,
            job.reason,
            job.progress.step,
            tuple(job.progress.evaluations),
            files.adapter(job.name),
            files.best(job.name),
            {key: options[job.name][key] for key in apart},
        )
        for job in jobs
    }
    return RunResult(files.out, results)
