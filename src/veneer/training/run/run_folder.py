"""The folder of a run.

runs/a/config.yaml            the resolved options
runs/a/run.json               the manifest: versions, threads, hashes of data and template, decisions made from measurements
runs/a/metrics/<job>.jsonl    a line for each step and each evaluation
runs/a/samples/<job>.jsonl    a line for each sample answer, if the options ask for them
runs/a/events.jsonl           starts, ends, checkpoints, failures
runs/a/control*.json          requests to the running process (see control.py), deleted when they are applied
runs/a/checkpoints/           the states from which a run resumes
runs/a/adapter/, best/        the last and the best adapter (several jobs: adapters/<job>/, best/<job>/)
runs/a/base/                  with calibrate: the quantized base (see calibrated_base.py)
runs/a/parts/<number>/        on a cluster: config.yaml, run.json, events.jsonl and checkpoints/ of some of the jobs
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from veneer._files import replace_text
from veneer.checkpoints.commit import LATEST, candidates, sweep
from veneer.checkpoints.run_state import Lock

CONFIG, MANIFEST, SAMPLES, PARTS = "config.yaml", "run.json", "samples", "parts"


class RunFolder:
    """Paths and files of a run. ``single``: the run has one job. ``whole``: the folder of a run on a cluster of which this run is a
    part, which takes its metrics, samples and adapters."""

    def __init__(self, out: Path, *, single: bool, whole: Path | None = None) -> None:
        self.out = out
        self.results = whole or out
        self.single = single
        self.checkpoints = out / "checkpoints"
        self.events = out / "events.jsonl"

    def metrics(self, job: str) -> Path:
        """The file of a job's metrics."""
        return self.results / "metrics" / f"{job}.jsonl"

    def samples(self, job: str) -> Path:
        """The file of a job's sample answers."""
        return self.results / SAMPLES / f"{job}.jsonl"

    def adapter(self, job: str) -> Path:
        """The folder of a job's last adapter."""
        return self.results / "adapter" if self.single else self.results / "adapters" / job

    def best(self, job: str) -> Path:
        """The folder of a job's best adapter."""
        return self.results / "best" if self.single else self.results / "best" / job

    def has_adapter(self, job: str) -> bool:
        """True if a job's last adapter is there."""
        return (self.adapter(job) / "adapter_config.json").is_file()

    def prepare(self) -> None:
        """Create the folders and remove unfinished files of a dead process. Call it only under the run's lock."""
        (self.results / "metrics").mkdir(parents=True, exist_ok=True)
        sweep(self.checkpoints)
        for folder in (self.out, *(self.out / name for name in ("adapter", "adapters", "best"))):
            sweep(folder)
            for left in (*folder.glob(".unfinished-*"), *folder.glob("*/.unfinished-*")):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove an earlier run. Its checkpoints go first, in one step, so that half a run is never resumed."""
        if self.checkpoints.exists():
            aside = self.checkpoints.with_name(f"checkpoints.tmp-{secrets.token_hex(4)}")
            self.checkpoints.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        for name in ("metrics", SAMPLES, "adapter", "adapters", "best", PARTS):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in (CONFIG, MANIFEST, self.events.name, *(f.name for f in self.out.glob("control*.json"))):
            (self.out / name).unlink(missing_ok=True)
        self.prepare()

    def forget_after(self, folder: Path) -> None:
        """Remove the checkpoints newer than ``folder``, the newest first."""
        for other in candidates(self.checkpoints):
            if other.name > folder.name:
                shutil.rmtree(other)
        replace_text(self.checkpoints / LATEST, folder.name)

    def growing(self, jobs: list[str]) -> dict[str, Path]:
        """The files that grow line by line, by the name under which a checkpoint records their length."""
        metrics = {f"metrics/{job}": self.metrics(job) for job in jobs}
        samples = {f"{SAMPLES}/{job}": self.samples(job) for job in jobs if self.samples(job).exists()}
        return {"events": self.events, **metrics, **samples}

    def lengths(self, jobs: list[str]) -> dict[str, int]:
        """The length of each growing file."""
        return {name: path.stat().st_size if path.exists() else 0 for name, path in self.growing(jobs).items()}

    def cut(self, lengths: dict[str, int], jobs: list[str]) -> None:
        """Cut growing files back to their lengths at a checkpoint."""
        for name, path in self.growing(jobs).items():
            if path.exists() and path.stat().st_size > lengths.get(name, 0):
                os.truncate(path, lengths.get(name, 0))

    def write_json(self, name: str, value: Any) -> None:
        """Replace a small file atomically."""
        replace_text(self.out / name, json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock; folders that the lock created are removed again if no run begins in them."""
    with ExitStack() as stack:
        lock = stack.enter_context(Lock(out))
        begun = (out / CONFIG).is_file()
        stack.callback(lambda: None if begun or (out / CONFIG).exists() else lock.leave_nothing(out / "metrics"))
        yield


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append a JSON line completely or not at all. Raises OSError if the disk is full."""
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise


def now() -> str:
    """The time of day, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
