"""Events, progress and checkpoints of one job, recorded as it runs."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from veneer.serve.registry import ModelRegistry
from veneer.serve.store.jobs import JobStore
from veneer.training.loop.job import Job
from veneer.training.shared_base import Watcher

KEPT = 3
"""Checkpoints of a job that can be requested as models; older ones are removed."""
SAVES = 10
"""About the number of checkpoints of a job that gives no ``save_every``."""
_COLUMNS = {
    "step": "step",
    "train_loss": "loss",
    "learning_rate": "lr",
    "gradient_norm": "grad_norm",
    "valid_loss": "held_out_loss",
}
"""Columns of the table of results -> names in a run's metrics."""


class JobWatcher(Watcher):
    """Follows the run of one job."""

    def __init__(
        self, store: JobStore, job_id: str, folder: Path, registry: ModelRegistry, stopping: Callable[[], bool]
    ) -> None:
        """``folder`` is the folder of the run; ``stopping`` tells whether the job is to stop."""
        self._store = store
        self._id = job_id
        self._models = folder / "models"
        self._registry = registry
        self._stopping = stopping
        self._metrics: dict[str, float] = {}
        self._every = 1
        self._steps = 0
        self._step = 0
        self._began = (0, time.monotonic())

    def started(self, jobs: list[Job]) -> None:
        """Note where the job begins or goes on."""
        (job,) = jobs
        self._steps, self._step = job.steps, job.progress.step
        self._every = job.options.save_every or max(1, job.steps // SAVES)
        self._began = (job.progress.step, time.monotonic())
        self._store.progress(self._id, steps=job.steps, step=job.progress.step, trained_tokens=job.progress.tokens)

    def line(self, job: Job, values: dict[str, Any]) -> None:
        """Record a step or an evaluation as an event, and the job's progress."""
        step = self._step = int(values["step"])
        loss = values.get("loss")
        if loss is not None:
            self._metrics = {"step": step, "train_loss": loss}
            key, text = f"step-{step}", f"training loss={loss:.4f}"
        elif (held_out := values.get("held_out_loss")) is not None:
            self._metrics = {**self._metrics, "step": step, "valid_loss": held_out}
            key, text = f"evaluation-{step}", f"validation loss={held_out:.4f}"
        else:
            return
        first, since = self._began
        with self._store.transaction():
            self._store.add_event(
                self._id, key, f"Step {step}/{self._steps}: {text}", kind="metrics", data={**self._metrics}
            )
            self._store.progress(
                self._id,
                step=step,
                trained_tokens=job.progress.tokens,
                seconds=(time.monotonic() - since) / max(1, step - first),
            )

    def wants_checkpoint(self) -> bool:
        """True if a checkpoint is due."""
        return self._step % self._every == 0

    def checkpoint(self, job: Job, save: Callable[[Path], None]) -> None:
        """Write the adapter of a checkpoint and serve it; older ones are removed."""
        step = job.progress.step
        if step == 0 or job.state == "failed":
            return
        folder = self._models / f"step-{step}"
        save(folder)
        self._registry.publish_checkpoint(job.name, step, folder)
        with self._store.transaction():
            self._store.add_checkpoint(self._id, step, self._metrics)
            self._store.add_event(self._id, f"checkpoint-{step}", f"Checkpoint created at step {step}")
        for old in self._store.steps_of(self._id)[KEPT:]:
            self._registry.withdraw_checkpoint(job.name, old)
            self._store.forget_checkpoint(self._id, old)
            shutil.rmtree(self._models / f"step-{old}", ignore_errors=True)

    def wants_stop(self) -> bool:
        """True if the job is to stop after this round."""
        return self._stopping()


def result_table(metrics: Iterable[str]) -> bytes:
    """The metrics of a run, one JSON object a line, as a CSV file with one row per step."""
    rows: dict[int, dict[str, Any]] = {}
    for line in metrics:
        values = json.loads(line)
        rows.setdefault(values["step"], {}).update(values)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for step in sorted(rows):
        writer.writerow([rows[step].get(key, "") for key in _COLUMNS.values()])
    return out.getvalue().encode()
