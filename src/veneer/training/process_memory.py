"""Resident memory of this process: now, at the peak of a span of code, and what it may still use.

Resident memory is what the machine's limit applies to: weights, adapters, activations, and freed memory that the allocator keeps. Linux
records a process's peak (``VmHWM``) and resets it on request (``clear_refs``), so the peak of a single call can be read exactly.
Elsewhere a thread samples every millisecond.

    with peak_of() as peak:
        step()
    peak.bytes
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_MMAP_THRESHOLD = -3
"""The C library's name of this setting."""
_PROC = Path("/proc/self")
_GROUPS = Path("/sys/fs/cgroup")
_SAMPLING_SECONDS = 1e-3


@dataclass
class PeakMemory:
    """Peak resident memory of a span of code in bytes; 0 if the system does not report it."""

    bytes: int = 0


_before = 0
"""The highest peak that was reset so far."""


def resident() -> int:
    """Resident memory in bytes; its peak if the system reports no more."""
    try:
        return int((_PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def highest() -> int:
    """Peak resident memory of the whole life of the process."""
    return max(_before, _peak() or resident())


@contextmanager
def peak_of() -> Iterator[PeakMemory]:
    """Measure the peak resident memory inside this context; ``.bytes`` is set when it ends."""
    found = PeakMemory()
    if _reset_peak():
        yield found
        found.bytes = _peak() or 0
        return
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLING_SECONDS):
            found.bytes = max(found.bytes, resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found.bytes = max(found.bytes, resident())


def free() -> int | None:
    """Bytes that this process may still use: the least of the machine's and of its control groups'; None if nothing reports it."""
    found = [left for left in (_machine(), *_groups()) if left is not None]
    return min(found) if found else None


def return_large_blocks() -> None:
    """Let the C library return blocks of a quarter MiB or more when they are freed.

    Otherwise it keeps them, and the layers of a divided base, gathered and freed in turn, leave as much as the whole base behind.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 18)


def give_back() -> None:
    """Return freed memory of Python and the C library to the system."""
    gc.collect()
    trim()


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Let garbage collections inside look only at objects made inside: those of torch and transformers take a third of a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim() -> None:
    """Return freed memory of the C library to the system, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Heap:
    """Limits the freed memory that the C library keeps: passes of varying sizes leave holes into which the next ones do not fit.

    Returning memory means faulting it in again, which takes a sixth of a step. So it is done only when the memory held after a pass is
    twice what one pass needs at its peak, which is measured in the first pass after each return.
    """

    def __init__(self) -> None:
        self._floor, self._need, self._fresh = resident(), 0, True

    def at_peak(self) -> None:
        """All activations of a pass are in memory."""
        if self._fresh:
            self._need, self._fresh = max(self._need, resident() - self._floor), False

    def after_pass(self) -> None:
        """A pass is over, its activations freed."""
        if resident() > self._floor + 2 * self._need:
            self.give_back()

    def give_back(self) -> None:
        """Return freed memory, for example before and after an evaluation, whose passes have other sizes."""
        trim()
        self._floor, self._fresh = resident(), True


def _peak() -> int | None:
    """Peak resident memory since the last reset."""
    try:
        return _field(_PROC / "status", "VmHWM")
    except OSError:
        return None


def _reset_peak() -> bool:
    """Reset the peak; returns False if the system cannot."""
    global _before
    peak = _peak()
    if peak is None:
        return False
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    _before = max(_before, peak)
    return True


def _field(path: Path, name: str) -> int | None:
    """The bytes in a line such as ``VmHWM:  123 kB``."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None


def _machine() -> int | None:
    try:
        return _field(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return None


def _groups() -> Iterator[int]:
    """Bytes left in each control group of this process, of version 2 or 1."""
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = _GROUPS / "memory" if controllers else _GROUPS
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            )
            folder = root / path.lstrip("/")
            while True:
                left = _left(folder, *names)
                if left is not None:
                    yield left
                if folder == root or root not in folder.parents:
                    break
                folder = folder.parent


def _left(folder: Path, limit: str, usage: str) -> int | None:
    """A group's limit less its usage, without file pages that can be dropped at once."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdigit():
        return None
    return max(0, int(most) - used + int(stat.get("inactive_file", 0)))
