"""The queue of jobs: a few run at once, each in its own thread and folder, on the base that serves.

A job is a training run like any other (`veneer.training.train`), so it resumes from its last checkpoint when the server is started
again, and ends with the same bits. Passes of jobs and steps of the engine take turns.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from pathlib import Path
from typing import Any

from veneer.config import TrainOptions
from veneer.errors import BaseModelError, DataError, MemoryPlanError, TrainingError, VeneerError
from veneer.serve.jobs.options import RequestError, as_option_names, job_options
from veneer.serve.jobs.watcher import JobWatcher, result_table
from veneer.serve.registry import ModelRegistry
from veneer.serve.store.files import FileStore
from veneer.serve.store.jobs import JobStore
from veneer.training import train
from veneer.training.run.console import Console
from veneer.training.shared_base import SharedBase

_log = logging.getLogger(__name__)


class JobQueue:
    """Runs the jobs in the store. At most ``parallel`` run at once; the others wait in the order in which they came."""

    def __init__(
        self,
        store: JobStore,
        files: FileStore,
        shared: SharedBase,
        folder: Path,
        registry: ModelRegistry,
        *,
        parallel: int,
    ) -> None:
        self.store = store
        self.files = files
        self.shared = shared
        self.folder = folder
        self.registry = registry
        self.parallel = parallel
        self._running: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._changed = threading.Event()
        self._scheduler = threading.Thread(target=self._schedule, name="job queue", daemon=True)

    def start(self) -> None:
        """Queue the jobs that a killed server was running, and run what is queued."""
        for job in self.store.with_status("running"):
            self.store.move(job["id"], "queued", "The server was restarted; the job goes on from its last checkpoint")
        self._scheduler.start()

    def stop(self) -> None:
        """Save and stop the running jobs; the next start goes on with them."""
        self._stopping.set()
        self._changed.set()
        if self._scheduler.is_alive():
            self._scheduler.join()
        for thread in list(self._running.values()):
            thread.join()

    def wake(self) -> None:
        """Look for jobs that can run."""
        self._changed.set()

    @property
    def running(self) -> int:
        """Number of jobs that hold one of the parallel places."""
        return len(self._running)

    def stops(self, job_id: str) -> bool:
        """True if the job is to stop after its current round: it was paused or cancelled, or the server stops."""
        return self._stopping.is_set() or self.store[job_id]["status"] != "running"

    def _schedule(self) -> None:
        while not self._stopping.is_set():
            self._changed.clear()
            try:
                self._fill()
            except Exception:  # a full disk, say; the jobs stay queued
                _log.exception("the queue of jobs could not be read")
            self._changed.wait(timeout=5.0)

    def _fill(self) -> None:
        for job in self.store.with_status("validating_files", "queued"):
            with self._lock:
                # A paused job that was resumed may still be in its last round.
                if len(self._running) >= self.parallel or job["id"] in self._running or self._stopping.is_set():
                    continue
                if job["status"] == "validating_files" and not self.store.move(job["id"], "queued", "Validating files"):
                    continue
                if not self.store.move(job["id"], "running", "Fine-tuning job started"):
                    continue
                thread = threading.Thread(target=self._run, args=(job["id"],), name=job["id"], daemon=True)
                self._running[job["id"]] = thread
                thread.start()

    def _run(self, job_id: str) -> None:
        try:
            self._train(job_id)
        except KeyboardInterrupt:  # stopped and saved; the status tells why
            pass
        except RequestError as error:
            self._fail(job_id, error.code, str(error), error.param)
        except (DataError, BaseModelError) as error:
            self._fail(job_id, "invalid_training_file", str(error), "training_file")
        except TrainingError as error:
            self._fail(job_id, error.code, str(error), "training_file" if error.code == "data" else None)
        except MemoryPlanError as error:
            self._fail(job_id, "memory", as_option_names(str(error)), "training")
        except VeneerError as error:
            self._fail(job_id, "training_failed", str(error), None)
        except (OSError, sqlite3.OperationalError) as error:
            reason = getattr(error, "strerror", None) or error
            self._fail(
                job_id, "disk", f"the job's files cannot be written: {reason}; free some space on the disk", None
            )
        except Exception:
            _log.exception("job %s failed", job_id)
            self._fail(job_id, "server_error", "the server had an error; its log has the details", None)
        finally:
            with self._lock:
                del self._running[job_id]
            self._changed.set()

    def _train(self, job_id: str) -> None:
        job = self.store[job_id]
        options = self.options_of(job)
        watcher = JobWatcher(self.store, job_id, self.out_of(job_id), self.registry, lambda: self.stops(job_id))
        result = train(options, base=self.shared, watcher=watcher, console=Console(quiet=True))
        (done,) = result.jobs.values()
        if done.state == "finished":
            self._publish(job_id, done.name, done.adapter)

    def _publish(self, job_id: str, name: str, folder: Path) -> None:
        """Make the model of a finished job available, store its results and end it. A killed server does all of it again."""
        metrics = (self.out_of(job_id) / "metrics" / f"{name}.jsonl").read_text(encoding="utf-8")
        table = result_table(metrics.splitlines())

        def succeed() -> bool:
            if self.store[job_id]["status"] != "running":  # cancelled or paused in the meantime
                return False
            self.store.add_event(job_id, "model", f"New fine-tuned model created: {name}")
            row = self.files.add(table, filename="step_metrics.csv", purpose="fine-tune-results")
            return self.store.move(job_id, "succeeded", "The job has successfully completed", result_file=row["id"])

        self.registry.publish(name, folder, job_id, succeed)

    def _fail(self, job_id: str, code: str, message: str, param: str | None) -> None:
        """Record that a job has failed. On a full disk this waits for room, or for the server's end, after which the job goes on."""
        error = {"code": code, "message": message, "param": param}
        warned = False
        while not self._stopping.is_set():
            try:
                self.store.move(job_id, "failed", message, level="error", error=json.dumps(error))
            except sqlite3.OperationalError as problem:
                if not warned:
                    _log.error("the end of job %s cannot be recorded yet: %s", job_id, problem)
                warned = True
                self._stopping.wait(1.0)
            else:
                return

    def out_of(self, job_id: str) -> Path:
        """The folder of a job's run."""
        return self.folder / job_id

    def options_of(self, job: dict[str, Any]) -> TrainOptions:
        """The training options of a job.

        Raises:
            RequestError: a file of the job is gone.
        """
        data = self._file(job["training_file"], "training_file")
        valid = None if job["validation_file"] is None else self._file(job["validation_file"], "validation_file")
        return job_options(
            json.loads(job["request"]),
            name=job["name"],
            base=self.shared.base,
            data=data,
            valid=valid,
            start=self.registry.folder_of(json.loads(job["request"])["model"]),
            out=self.out_of(job["id"]),
            seed=job["seed"],
        )

    def _file(self, file_id: str, param: str) -> Path:
        row = self.files.get(file_id)
        if row is None:
            raise RequestError(f"the file {file_id} was deleted", param, "file_not_found")
        return self.files.path(row)
