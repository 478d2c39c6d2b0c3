"""A queue of jobs on a tiny base, without a server: what the tests of jobs are made of."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.checkpoints import attach
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.load import Base
from veneer.serve.jobs.queue import JobQueue
from veneer.serve.store.database import Database
from veneer.serve.store.files import FileStore
from veneer.serve.store.jobs import OVER, Creation, JobStore
from veneer.training.shared_base import SharedBase

SHORT = {
    "model": "base",
    "adapter": {"r": 2, "lora_dropout": 0.1},
    "training": {"steps": 12, "learning_rate": 1e-2, "warmup_steps": 3, "save_every": 4},
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2}}},
}
"""A request for a short job."""


def wait(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition does not come true"
        time.sleep(0.005)


class Published:
    """A registry of models that remembers."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.checkpoints: dict[tuple[str, int], Path] = {}
        self.before_publishing: Callable[[str], object] = lambda job_id: None

    def folder_of(self, model: str) -> Path | None:
        """The base, or a published model."""
        return None if model == "base" else self.models[model]

    def publish(self, name: str, folder: Path, job_id: str, succeed: Callable[[], bool]) -> None:
        """Remember the model of a job that has succeeded."""
        assert (folder / "adapter_config.json").is_file()
        self.before_publishing(job_id)
        if succeed():
            self.models[name] = folder

    def publish_checkpoint(self, name: str, step: int, folder: Path) -> None:
        """Remember the checkpoint."""
        assert (folder / "adapter_config.json").is_file()
        self.checkpoints[name, step] = folder

    def withdraw_checkpoint(self, name: str, step: int) -> None:
        """Forget the checkpoint."""
        self.checkpoints.pop((name, step), None)


class Jobs:
    """A store, files and a queue in one folder, as a server has them."""

    def __init__(self, state: Path, base: Base, *, parallel: int = 2) -> None:
        state.mkdir(exist_ok=True)
        self.state = state
        self.database = Database(state / "state.db")
        self.files = FileStore(self.database, state / "files")
        self.store = JobStore(self.database)
        self.bank = attach(base.model)
        use_fast_forwards(base.model)
        self.lock = threading.Lock()
        self.turns = 0
        self.published = Published()
        shared = SharedBase(base, self.bank, self._turn)
        self.queue = JobQueue(self.store, self.files, shared, state / "jobs", self.published, parallel=parallel)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self.lock:
            self.turns += 1
            yield

    def upload(self, path: Path) -> str:
        """Store a file; returns its id."""

        with path.open("rb") as content:
            received = self.files.receive(
                content, filename=path.name, purpose="fine-tune", limit=1 << 20, total_limit=1 << 30, expires_after=None
            )
        return str(received["id"])

    def create(self, training_file: str, suffix: str | None = None, *, seed: int = 0, **request: Any) -> str:
        """Create a job; returns its id."""
        body = hashlib.sha256(f"{training_file}{suffix}{time.time_ns()}".encode()).hexdigest()
        job = self.store.create(
            Creation("key", body, None, False, time.time()),
            request={**SHORT, **request},
            suffix=suffix,
            training_file=training_file,
            validation_file=None,
            seed=seed,
            metadata={},
            checked=True,
        )
        self.queue.wake()
        return str(job["id"])

    def wait(self, job_id: str, *statuses: str, seconds: float = 60) -> dict[str, Any]:
        """Wait until a job has one of the statuses (by default: until it is over)."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            job = self.store[job_id]
            if job["status"] in (statuses or OVER):
                return job
            time.sleep(0.01)
        raise AssertionError(
            f"{job_id} is {self.store[job_id]['status']}: {self.store.events(job_id, after=None, limit=5)}"
        )

    def messages(self, job_id: str) -> list[str]:
        """The messages of a job's events, oldest first; their numbers have no gap."""
        found, more = self.store.events(job_id, after=None, limit=10_000)
        assert not more and [event["seq"] for event in reversed(found)] == list(range(1, len(found) + 1))
        return [event["message"] for event in reversed(found)]

    def close(self) -> None:
        """Stop the queue and take the bank off the base."""
        self.queue.stop()
        self.database.close()
        self.bank.detach()
