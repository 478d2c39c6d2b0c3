"""The run's folder, as a person reads it.

runs/a/config.yaml            what was asked for, resolved
runs/a/run.json               what it ran on: versions, threads, data and template hashes, choices made from measurement
runs/a/metrics/<job>.jsonl    a line for each step and each look at the held-out examples
runs/a/events.jsonl           starts, ends, checkpoints, failures
runs/a/control.json           what somebody asks of the run while it goes on (see control.py); it is taken away when done
runs/a/checkpoints/           what a resumed run goes on from
runs/a/adapter/, best/        the last and the best adapter (several jobs: adapters/<job>/, best/<job>/)
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from veneer._files import replace_text
from veneer.checkpoints.commit import LATEST, candidates, sweep

CONFIG, FACTS = "config.yaml", "run.json"


class RunFiles:
    """Paths of a run and its growing files. ``single``: whether one job has the folder to itself."""

    def __init__(self, out: Path, *, single: bool) -> None:
        self.out = out
        self.single = single
        self.checkpoints = out / "checkpoints"
        self.events = out / "events.jsonl"

    def metrics(self, job: str) -> Path:
        """A job's figures."""
        return self.out / "metrics" / f"{job}.jsonl"

    def adapter(self, job: str) -> Path:
        """Where a job's last adapter goes."""
        return self.out / "adapter" if self.single else self.out / "adapters" / job

    def best(self, job: str) -> Path:
        """Where a job's best adapter goes."""
        return self.out / "best" if self.single else self.out / "best" / job

    def prepare(self) -> None:
        """Make the folders and sweep what a dead process left aside. Only under the run's lock."""
        (self.out / "metrics").mkdir(parents=True, exist_ok=True)
        sweep(self.checkpoints)
        for place in (self.out, *(self.out / name for name in ("adapter", "adapters", "best"))):
            sweep(place)
            for left in (*place.glob(".unfinished-*"), *place.glob("*/.unfinished-*")):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove what an earlier run left here. First its state, in one step, so that half a run is never gone on with."""
        if self.checkpoints.exists():
            aside = self.checkpoints.with_name(f"checkpoints.tmp-{secrets.token_hex(4)}")
            self.checkpoints.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        for name in ("metrics", "adapter", "adapters", "best"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in (CONFIG, FACTS, self.events.name, *(f.name for f in self.out.glob("control*.json"))):
            (self.out / name).unlink(missing_ok=True)
        self.prepare()

    def forget_after(self, folder: Path) -> None:
        """Remove the checkpoints that are newer than one, newest first: the run goes on from that one, and they are of another course."""
        for other in candidates(self.checkpoints):
            if other.name > folder.name:
                shutil.rmtree(other)
        replace_text(self.checkpoints / LATEST, folder.name)

    def growing(self, jobs: list[str]) -> dict[str, Path]:
        """The files that grow line by line, by the name under which a checkpoint keeps their length."""
        return {"events": self.events, **{f"metrics/{job}": self.metrics(job) for job in jobs}}

    def lengths(self, jobs: list[str]) -> dict[str, int]:
        """How long each growing file is."""
        return {name: path.stat().st_size if path.exists() else 0 for name, path in self.growing(jobs).items()}

    def cut(self, lengths: dict[str, int], jobs: list[str]) -> None:
        """Cut growing files back to what they were at a checkpoint."""
        for name, path in self.growing(jobs).items():
            if path.exists() and path.stat().st_size > lengths.get(name, 0):
                os.truncate(path, lengths.get(name, 0))

    def write_json(self, name: str, value: Any) -> None:
        """Replace a small file of the run in one step."""
        replace_text(self.out / name, json.dumps(value, indent=2, sort_keys=True) + "\n")


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add a line to a growing file, whole or not at all. A full disk is told by the caller."""
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
