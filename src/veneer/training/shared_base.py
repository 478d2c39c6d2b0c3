"""A base that serves requests while jobs train on it, and the process's view of a run on it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapters import Bank
from veneer.models.load import Base
from veneer.training.loop.job import Job


@dataclass(frozen=True)
class SharedBase:
    """A base in memory that others use at the same time, with the faster forms of its modules on it.

    Attributes:
        base: the base.
        bank: its bank, to which a run adds its adapters and from which it removes them.
        turn: a context that holds the model for one pass or one change of the bank; others run between two turns.
    """

    base: Base
    bank: Bank
    turn: Callable[[], AbstractContextManager[None]]


class Watcher:
    """Follows a run from the process that it runs in. The methods of this class do nothing."""

    def started(self, jobs: list[Job]) -> None:
        """The jobs are ready for their next step: new, or restored from a checkpoint."""

    def line(self, job: Job, values: dict[str, Any]) -> None:
        """A line of a job's metrics: a step or an evaluation."""

    def checkpoint(self, job: Job, save: Callable[[Path], None]) -> None:
        """The state of a job is about to be saved. ``save`` writes its present adapter as a folder."""

    def wants_checkpoint(self) -> bool:
        """Called after every round; True saves a checkpoint besides those that the options ask for."""
        return False

    def wants_stop(self) -> bool:
        """Called after every round; True saves and stops the run."""
        return False
