"""Lists the runs in a folder, with the state of each of their jobs, from the files of the runs.

    state       from the newest checkpoint; an unfinished job is "running" while a process holds the lock of its run,
                else "interrupted"
    step, loss  from the last lines of the job's metrics
    adapter     the adapter folder, once it exists

This file does not import torch, so that the list is fast, and writes nothing into the folder of a run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.checkpoints.locate import adapter_of_job
from veneer.config import load_yaml
from veneer.errors import CheckpointError, ConfigError

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
    return [status for folder in _folders(root, 0) for status in _read(folder)]


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield the folders of runs; a run is not searched for further runs."""
    if (root / "config.yaml").is_file() and ((root / "metrics").is_dir() or (root / "run.json").is_file()):
        yield root
    elif depth < _DEEPEST:
        with contextlib.suppress(OSError):
            for child in sorted(root.iterdir()):
                if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                    yield from _folders(child, depth + 1)


def _read(folder: Path) -> list[JobStatus]:
    """Read the jobs of one run."""
    saved = _saved(folder)
    names = sorted({*saved, *(file.stem for file in (folder / "metrics").glob("*.jsonl"))}) or [folder.name]
    try:
        base = str(load_yaml(folder / "config.yaml").values.get("base", ""))
    except ConfigError:
        base = ""
    return [_job(folder, name, saved.get(name, {}), base) for name in names]


def _job(folder: Path, name: str, saved: dict[str, Any], base: str) -> JobStatus:
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
    state = saved.get("state", "running")
    adapter = adapter_of_job(folder, name)
    return JobStatus(
        run=str(folder),
        job=name,
        state="interrupted" if state == "running" and not held(folder / ".lock") else state,
        reason=saved.get("reason", ""),
        step=metrics["step"],
        loss=metrics.get("loss"),
        held_out=metrics["held_out_loss"],
        best=best,
        base=base,
        adapter=None if adapter is None else str(adapter),
    )


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
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return
    for line in lines[1 if start else 0 : -1]:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


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
