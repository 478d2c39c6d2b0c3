"""Lists the runs in a folder, with the state of each of their jobs, from the files of the runs.

    state       from the newest checkpoint; an unfinished job is "running" while a process holds the lock of its run,
                else "interrupted"
    step, loss  from the last lines of the job's metrics
    adapter     the adapter folder, once it exists

The result is cached in an SQLite file beside the runs, keyed by the sizes and times of the files that were read. A run
whose files changed is read again; a cache that is missing, damaged or cannot be written only costs time.

This file does not import torch, so that the list is fast, and writes nothing into the folder of a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.checkpoints.locate import adapter_of_job
from veneer.config import load_yaml
from veneer.errors import CheckpointError, ConfigError

INDEX = ".runs.sqlite"
_FORMAT = 1
_TAIL = 1 << 16
_DEEPEST = 3
_LARGEST = 32 << 20


@dataclass(frozen=True)
class JobStatus:
    """One job of one run. ``loss`` is the last training loss, ``held_out`` the last held-out loss, ``best`` the lowest."""

    run: str
    job: str
    state: str
    reason: str
    step: int
    loss: float | None
    held_out: float | None
    best: float | None
    base: str
    adapter: str | None


def list_runs(root: Path) -> list[JobStatus]:
    """Return every job of every run at or below ``root``, ordered by folder and name.

    Raises:
        CheckpointError: There is no such folder.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; name the folder that contains your runs")
    rows: list[JobStatus] = []
    with closing(_open(root)) as index:
        known = {
            path: (signature, jobs) for path, signature, jobs in index.execute("select path, signature, jobs from runs")
        }
        found: dict[str, tuple[str, str]] = {}
        for folder in _folders(root, 0):
            path, signature = str(folder.resolve()), _signature(folder)
            jobs = known[path][1] if known.get(path, ("",))[0] == signature else json.dumps(_read(folder))
            found[path] = (signature, jobs)
            rows += [_live(folder, job) for job in json.loads(jobs)]
        _keep(index, known, found)
    return rows


def as_dict(status: JobStatus) -> dict[str, Any]:
    """Return a job's status as plain data."""
    return asdict(status)


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield the folders of runs; a run is not searched for further runs."""
    if (root / "config.yaml").is_file() and ((root / "metrics").is_dir() or (root / "run.json").is_file()):
        yield root
    elif depth < _DEEPEST:
        with contextlib.suppress(OSError):
            for child in sorted(root.iterdir()):
                if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                    yield from _folders(child, depth + 1)


# Cache


def _open(root: Path) -> sqlite3.Connection:
    """Open the cache: create it again if it is damaged, keep it in memory if it cannot be written."""
    path = root / INDEX
    for attempt in range(2):
        try:
            return _prepared(sqlite3.connect(path, timeout=5))
        except sqlite3.OperationalError:
            break  # read-only, full, or locked
        except sqlite3.DatabaseError:
            if attempt:
                break
            with contextlib.suppress(OSError):
                path.unlink()
    return _prepared(sqlite3.connect(":memory:"))


def _prepared(index: sqlite3.Connection) -> sqlite3.Connection:
    try:
        with index:
            if index.execute("pragma user_version").fetchone()[0] != _FORMAT:
                index.execute("drop table if exists runs")
                index.execute(f"pragma user_version = {_FORMAT}")
            index.execute(
                "create table if not exists runs (path text primary key, signature text, jobs text) without rowid"
            )
            index.execute("select path, signature, jobs from runs limit 1").fetchone()
    except sqlite3.Error:
        index.close()
        raise
    return index


def _keep(index: sqlite3.Connection, known: dict[str, Any], found: dict[str, tuple[str, str]]) -> None:
    """Update the cache; if this fails, the runs are read again next time."""
    with contextlib.suppress(sqlite3.Error), index:
        index.executemany("delete from runs where path = ?", [(path,) for path in known if path not in found])
        changed = [(path, *values) for path, values in found.items() if known.get(path) != values]
        index.executemany("insert or replace into runs values (?, ?, ?)", changed)


def _signature(folder: Path) -> str:
    """Return a text that changes whenever a file of the run changes that its status is read from."""
    files = [folder / "config.yaml", folder / "checkpoints" / "LATEST", *sorted((folder / "metrics").glob("*.jsonl"))]
    files += sorted((folder / "parts").glob("*/checkpoints/LATEST"))
    files += [
        adapter / "adapter_config.json"
        for adapter in (
            *(folder / "adapter", folder / "best", *sorted((folder / "adapters").glob("*"))),
            *sorted((folder / "best").glob("*")),
        )
    ]
    parts = []
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            parts.append(f"{file.relative_to(folder)}:{status.st_size}:{status.st_mtime_ns}")
    return "|".join(parts)


# Reading one run


def _read(folder: Path) -> list[dict[str, Any]]:
    """Read the jobs of one run."""
    saved = _saved(folder)
    names = sorted({*saved, *(file.stem for file in (folder / "metrics").glob("*.jsonl"))}) or [folder.name]
    try:
        base = str(load_yaml(folder / "config.yaml").values.get("base", ""))
    except ConfigError:
        base = ""
    return [_job(folder, name, saved.get(name, {}), base) for name in names]


def _job(folder: Path, name: str, saved: dict[str, Any], base: str) -> dict[str, Any]:
    progress = saved.get("progress") or {}
    evaluations = [loss for _, loss in progress.get("evaluations") or []]
    best = progress.get("best")
    metrics: dict[str, Any] = {
        "step": progress.get("step", 0),
        "held_out_loss": evaluations[-1] if evaluations else None,
    }
    for line in _tail(folder / "metrics" / f"{name}.jsonl"):
        metrics.update(line)
        held_out = line.get("held_out_loss")
        if held_out is not None:
            best = held_out if best is None else min(best, held_out)
    adapter = adapter_of_job(folder, name)
    return {
        "job": name,
        "state": saved.get("state", "running"),
        "reason": saved.get("reason", ""),
        "step": metrics["step"],
        "loss": metrics.get("loss"),
        "held_out": metrics["held_out_loss"],
        "best": best,
        "base": base,
        "adapter": None if adapter is None else str(adapter.relative_to(folder)),
    }


def latest_samples(run: Path, job: str) -> list[dict[str, Any]]:
    """Return the sample answers of a job's latest evaluation, with step, prompt, answer and expected; empty if there are none."""
    found = [line for line in _tail(run / "samples" / f"{job}.jsonl") if {"step", "prompt", "answer"} <= line.keys()]
    return [line for line in found if line["step"] == found[-1]["step"]]


def _saved(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the jobs in the newest readable checkpoint, or in those of all parts of a run on a cluster; empty before the first one."""
    parts = sorted((folder / "parts").glob("*/checkpoints"))
    return {name: job for one in parts or [folder / "checkpoints"] for name, job in _newest(one).items()}


def _newest(checkpoints: Path) -> dict[str, dict[str, Any]]:
    """Return the jobs in the newest readable of these checkpoints."""
    names = sorted((file.parent.name for file in checkpoints.glob("step-*/state.json")), reverse=True)
    for name in names:
        file = checkpoints / name / "state.json"
        try:
            if ".tmp-" not in name and file.stat().st_size <= _LARGEST:
                return dict(json.loads(file.read_text(encoding="utf-8"))["jobs"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def _tail(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the last complete lines of a job's metrics."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL)
            file.seek(start)
            lines = file.read().split(b"\n")[1 if start else 0 : -1]
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def _live(folder: Path, job: dict[str, Any]) -> JobStatus:
    """Return a job's status now, with paths relative to the current folder."""
    state = "interrupted" if job["state"] == "running" and not held(folder / ".lock") else job["state"]
    adapter = None if job["adapter"] is None else str(folder / job["adapter"])
    return JobStatus(run=str(folder), **{**job, "state": state, "adapter": adapter})


def held(lock: Path) -> bool:
    """Tell whether a process holds a run's lock, without taking it: that would make a run fail that starts now."""
    try:
        inode = lock.stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        return any("FLOCK" in line and f":{inode} " in line for line in locks)
    except OSError:
        pass
    try:  # systems that do not list locks: the holder wrote its process id into the file
        os.kill(int(lock.read_text(encoding="ascii")), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True
