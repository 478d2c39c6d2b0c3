"""Training: jobs, the steps they take on one base, planning, and the run around them."""

from __future__ import annotations

from veneer.training.run.result import JobResult, RunResult
from veneer.training.run.run import train

__all__ = ["JobResult", "RunResult", "train"]
