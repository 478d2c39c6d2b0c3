"""Checks before the first step that the processes of a run would train the same thing: one folder, one version, one base."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch

from veneer._version import __version__
from veneer.errors import ProcessError
from veneer.training.parallel.processes import Processes

_MARK = ".lock"
_SECONDS = 15.0
"""Time in which a file that the first process made must show elsewhere: network file systems keep names for a few seconds."""


def versions() -> dict[str, str]:
    """Versions on which the numbers of a run depend."""
    import transformers

    return {
        "veneer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def check_versions(processes: Processes) -> None:
    """Raise ProcessError, in all processes, if one runs other versions than the first."""
    if processes.alone:
        return
    first, *others = processes.gather(versions())
    for rank, found in enumerate(others, 1):
        different = [
            f"{name} {found[name]} ({first[name]} in process 0)" for name in first if found[name] != first[name]
        ]
        if different:
            raise ProcessError(
                f"process {rank} runs {', '.join(different)}, so they would not train alike; install the same versions everywhere"
            )


def check_folder(processes: Processes, out: Path) -> None:
    """Raise ProcessError, in all processes, if one does not see the run's folder, which the first process has locked."""
    if processes.alone:
        return
    expected = processes.share(_mark(out) if processes.first else None)
    until = time.monotonic() + _SECONDS
    while not (seen := _mark(out) == expected) and time.monotonic() < until:
        time.sleep(0.05)
    apart = next((rank for rank, sees in enumerate(processes.gather(seen)) if not sees), None)
    if apart is not None:
        raise ProcessError(
            f"process {apart} does not see {out} as process 0 does; put --out on storage that all machines share"
        )


def check_same(processes: Processes, values: dict[str, Any]) -> None:
    """Raise ProcessError, in all processes, if one has another value under a name than the first."""
    if processes.alone:
        return
    first, *others = processes.gather(values)
    for rank, found in enumerate(others, 1):
        different = next((name for name in first if found.get(name) != first[name]), None)
        if different is not None:
            raise ProcessError(
                f"process {rank} has different {different} from process 0; give all processes the same files"
            )


def _mark(out: Path) -> list[Any] | None:
    """What tells the lock of a run from that of another in a folder of the same name; None where there is none."""
    try:
        stat = (out / _MARK).stat()
        return [(out / _MARK).read_text(errors="replace"), stat.st_size, int(stat.st_mtime)]
    except OSError:
        return None
