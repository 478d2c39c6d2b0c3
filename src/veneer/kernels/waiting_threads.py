"""The wait of OpenMP's threads, short while other processes need the processors.

A thread of GNU OpenMP that has done its share spins for some milliseconds, so that it starts the next share at once. On a quiet machine
that is the fastest way to wait. Beside a busy process it takes the time of the thread that it waits for, and a step lasts twice as long.

GNU OpenMP waits shortly by itself while it manages more threads than there are processors. ``WaitingThreads`` starts idle ones while the
threads of this process stand in line for processors, and ends them when the processors are free again. Results do not change: no thread
gets another share (docs/log/kernels.md).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["WaitingThreads"]

_BUSY, _FREE = 0.3, 0.1
"""Seconds in line for a processor, per second and of all threads together: above the first the wait is short, and below the second long."""
_INTERVAL = 1.0
"""Seconds between two looks."""
_TASKS = Path("/proc/self/task")


class WaitingThreads:
    """Chooses between the short and the long wait. Does nothing where the system or OpenMP's library does not allow it."""

    def __init__(self) -> None:
        """Begin with the long wait."""
        self._library = _openmp()
        self._looked = time.perf_counter()
        self._in_line = _seconds_in_line()
        self._idle: _IdleTeam | None = None

    @property
    def short(self) -> bool:
        """True while threads wait briefly."""
        return self._idle is not None

    def look(self) -> None:
        """Measure and choose, at most once a second. Called between steps."""
        now = time.perf_counter()
        passed = now - self._looked
        if self._library is None or self._in_line is None or passed < _INTERVAL:
            return
        in_line = _seconds_in_line()
        if in_line is None:
            return
        share = (in_line - self._in_line) / passed
        self._looked, self._in_line = now, in_line
        if share > _BUSY and self._idle is None:
            self._idle = _IdleTeam(self._library)
        elif share < _FREE:
            self.end()

    def end(self) -> None:
        """Return to the long wait."""
        if self._idle is not None:
            self._idle.end()
            self._idle = None


class _IdleTeam:
    """A thread whose OpenMP threads sleep: one more of them than there are processors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._over, started = threading.Event(), threading.Event()
        team = len(os.sched_getaffinity(0)) + 1

        def hold() -> None:
            # Any function without arguments does as the body of the region.
            body = ctypes.cast(library.omp_get_num_threads, ctypes.c_void_p)
            library.GOMP_parallel(body, None, ctypes.c_uint(team), ctypes.c_uint(0))
            started.set()
            self._over.wait()

        self._thread = threading.Thread(target=hold, name="idle OpenMP threads", daemon=True)
        self._thread.start()
        started.wait()

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def _openmp() -> ctypes.CDLL | None:
    """GNU OpenMP's library, if it is loaded and the user has not chosen a way to wait."""
    if "OMP_WAIT_POLICY" in os.environ:
        return None
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found = sorted({line.split()[-1] for line in lines if Path(line.split()[-1]).name.startswith("libgomp")})
    # Other packages bring copies of their own.
    own = [
        path for path in found if Path(torch.__file__).parent.parent in Path(path).parents and "torch" in path
    ] or found
    library = ctypes.CDLL(own[0]) if len(own) == 1 else None
    return library if hasattr(library, "GOMP_parallel") else None


def _seconds_in_line() -> float | None:
    """Seconds that the living threads of this process were ready and had no processor; None where the system does not count them."""
    total = 0
    try:
        for thread in _TASKS.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                total += int((thread / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9
