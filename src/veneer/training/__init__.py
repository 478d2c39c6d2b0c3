"""Training: jobs, the steps they take on one base, planning, and the run around them. Names resolve when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.training.run.result import JobResult, RunResult
    from veneer.training.run.run import train

__all__ = ["JobResult", "RunResult", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("veneer.training.run.run" if name == "train" else "veneer.training.run.result"), name)
