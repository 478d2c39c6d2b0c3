"""A worker of a cluster: a process that holds a base and trains parts of a run on it, one after another.

The ordinary run does the work, on a base in memory. Ray calls the methods, in threads: `stop` and `progress` while `train` runs.
This file does not import Ray.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import TrainOptions
from veneer.errors import FolderInUseError, VeneerError
from veneer.models.load import Base
from veneer.training.cluster.parts import RunPart
from veneer.training.loop.job import Job
from veneer.training.parallel.agreement import versions
from veneer.training.planning.plan import Planner
from veneer.training.planning.profile import adapter_bytes
from veneer.training.run.jobs import expand
from veneer.training.run.manifest import manifest_of
from veneer.training.run.result import RunResult
from veneer.training.run.setup import common_task, load_base_of, set_up
from veneer.training.shared_base import Watcher

TrainPart = Callable[..., RunResult | None]
"""Train a part: (options, base, folder of the whole run, watcher) -> the result, None if it was stopped."""
_COPIES = 7
"""A job's tensors, gradients and two moments, and the copies of a checkpoint while it is written."""
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Loaded:
    """A worker that is ready. ``fits``: number of jobs that its memory holds; None if nothing tells."""

    base: str
    fits: int | None


@dataclass(frozen=True)
class Outcome:
    """The end of a part on a worker: its result, None if it was stopped, or the error."""

    result: RunResult | None
    error: str = ""


class ClusterWorker:
    """What runs in a worker's process."""

    def __init__(self, train_part: TrainPart) -> None:
        self._train = train_part
        self._follower = _Follower()
        self._base: Base | None = None

    def versions(self) -> tuple[str, dict[str, str]]:
        """(name of the machine, versions)."""
        return socket.gethostname(), versions()

    def sees(self, file: str, content: str) -> bool:
        """True if a file that the driver has written has its content here."""
        try:
            return Path(file).read_text(encoding="utf-8") == content
        except OSError:
            return False

    def load(self, options: dict[str, Any], jobs: int) -> Loaded | str:
        """Load the base, and find how many of the ``jobs`` fit; ``options`` are those of a run of the largest. An error is returned."""
        try:
            return self._load(TrainOptions(**options), jobs)
        except VeneerError as error:
            return str(error)

    def _load(self, options: TrainOptions, count: int) -> Loaded:
        jobs = expand(options)
        if options.threads is not None:
            import torch

            torch.set_num_threads(options.threads)
        self._base = load_base_of(options, common_task(jobs))
        with set_up(options, jobs, self._base, lambda line: None) as setup:
            found = str(manifest_of(setup)["base"])
            if not options.plan or count == 1:
                return Loaded(found, None)
            planner = Planner(options, setup.stepper, setup.jobs, base=setup.base, tokens_per_shared_pass=0)
            plan = planner.make()
            planner.require(plan)
            each = _COPIES * max(adapter_bytes(job) for job in setup.jobs)
            return Loaded(found, None if plan.free is None else 1 + (plan.free - plan.peak) // max(1, each))

    def train(self, part: RunPart, whole: str) -> Outcome:
        """Train a part of the run in the folder ``whole``, or go on from its last checkpoint."""
        options = TrainOptions(**part.options)
        began = time.monotonic()
        while True:
            try:
                return Outcome(self._train(options, self._base, Path(whole), self._follower))
            except FolderInUseError as error:
                # The worker that had this part was given up, but may need a moment to end.
                if time.monotonic() - began > _LOCK_SECONDS:
                    return Outcome(None, str(error))
                time.sleep(1.0)
            except VeneerError as error:
                return Outcome(None, str(error))

    def stop(self) -> None:
        """Save after the current round, and end the part."""
        self._follower.stopped.set()

    def progress(self) -> dict[str, tuple[int, int, float]]:
        """(step, steps, loss) of each job of the part."""
        return dict(self._follower.progress)


class _Follower(Watcher):
    """Keeps the progress of the jobs, and stops them."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.progress: dict[str, tuple[int, int, float]] = {}

    def started(self, jobs: list[Job]) -> None:
        self.progress = {job.name: (job.progress.step, job.steps, math.nan) for job in jobs}

    def line(self, job: Job, values: dict[str, Any]) -> None:
        self.progress[job.name] = (job.progress.step, job.steps, values.get("loss", math.nan))

    def wants_stop(self) -> bool:
        return self.stopped.is_set()
