"""Memory of this process: what it holds, the most that it held while something ran, and what it may still take.

Resident memory is what counts against the machine: weights, adapters, activations, and what the allocator keeps of them after they are
freed. Linux writes down a process's highest mark (``VmHWM``) and takes it back on request (``clear_refs``), so the peak of a single call
can be read exactly; where that is not offered, a thread looks every millisecond.

    with peak_of() as seen:
        step()
    seen.bytes

What the process may still take is the least of what the machine has available and what its control group leaves it.
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

_PROC = Path("/proc/self")
_GROUPS = Path("/sys/fs/cgroup")
_SECONDS_BETWEEN_LOOKS = 1e-3


@dataclass
class Seen:
    """Highest resident memory of a span, in bytes; 0 where the system tells nothing."""

    bytes: int = 0


_before = 0
"""The highest mark that was erased so far."""


def resident() -> int:
    """Bytes that this process holds now; its highest mark where the system tells no more."""
    try:
        return int((_PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def highest() -> int:
    """The most bytes that this process has held since it began, whatever marks were erased in between."""
    mark = _mark()
    return max(_before, resident() if mark is None else mark)


@contextmanager
def peak_of() -> Iterator[Seen]:
    """The highest resident memory while the context is open, in ``.bytes`` when it is left."""
    seen = Seen()
    if _erase():
        yield seen
        seen.bytes = _mark() or 0
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            seen.bytes = max(seen.bytes, resident())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
        seen.bytes = max(seen.bytes, resident())


def free() -> int | None:
    """Bytes that this process may still take before the machine or its control group runs out, or None where nothing tells."""
    found = [left for left in (_machine(), *_groups()) if left is not None]
    return min(found) if found else None


def give_back() -> None:
    """Return to the system what Python and the C library keep of freed memory."""
    gc.collect()
    trim()


def trim() -> None:
    """Return to the system what the C library keeps of freed memory, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Heap:
    """Keeps the C library from hoarding: passes of ever other sizes leave holes that none of the next ones fits into.

    Handing memory back means faulting it all in again, which takes a sixth of a step and makes the next ones slower too. So it is done
    only when twice as much is held after a pass as one needs at its height, which is seen in the first one after each time.
    """

    def __init__(self) -> None:
        self._floor, self._need, self._fresh = resident(), 0, True

    def at_height(self) -> None:
        """A pass holds all its activations."""
        if self._fresh:
            self._need, self._fresh = max(self._need, resident() - self._floor), False

    def after_pass(self) -> None:
        """A pass is over, its activations freed."""
        if resident() > self._floor + 2 * self._need:
            self.give_back()

    def give_back(self) -> None:
        """Return what is kept: before and after judging, say, whose passes are of other sizes."""
        trim()
        self._floor, self._fresh = resident(), True


def _mark() -> int | None:
    """The highest mark since it was last erased."""
    try:
        return _field(_PROC / "status", "VmHWM")
    except OSError:
        return None


def _erase() -> bool:
    """Start the highest mark anew; returns whether the system did."""
    global _before
    mark = _mark()
    if mark is None:
        return False
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    _before = max(_before, mark)
    return True


def _field(path: Path, name: str) -> int | None:
    """A line like ``VmHWM:  123 kB`` of a file of the system, in bytes."""
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
    """What each control group above this process leaves: version 2, then version 1."""
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
    """A group's limit less its use; pages of files that can be dropped at once are no use."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdigit():
        return None
    return max(0, int(most) - used + int(stat.get("inactive_file", 0)))
