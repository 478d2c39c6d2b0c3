"""The server's side of a queue of jobs: it answers requests with the models that jobs make."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Publisher(Protocol):
    """Makes models of jobs available to requests."""

    def folder_of(self, model: str) -> Path | None:
        """The folder of the adapter that a model's name means; None for the base. Raises ServeError if there is none."""

    def publish(self, name: str, folder: Path, job_id: str) -> None:
        """Serve the adapter of a job that has finished training. Called again with the same values after a restart."""

    def publish_checkpoint(self, name: str, step: int, folder: Path) -> None:
        """Serve a checkpoint of a job."""

    def withdraw_checkpoint(self, name: str, step: int) -> None:
        """Refuse new requests for a checkpoint, whose folder is about to be deleted."""
