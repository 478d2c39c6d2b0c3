"""What a person sees of a run: one live line on a terminal, plain lines elsewhere.

A plain line comes at the first step, at the last, and at most every few seconds between.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_PLAIN_SECONDS = 5.0


class Screen:
    """Prints a run's course. ``quiet`` prints nothing."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream or sys.stdout
        self.quiet = quiet
        self.live = not quiet and self.stream.isatty()
        """Whether one line is written over again and again."""
        self._shown = ""
        self._last = 0.0

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        self.clear()
        print(text, file=self.stream, flush=True)

    def progress(self, text: str, *, important: bool = False) -> None:
        """The line that is written over; without a terminal, a plain line now and then."""
        if self.quiet:
            return
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            text = text[:width]
            self.stream.write("\r" + text.ljust(len(self._shown)))
            self.stream.flush()
            self._shown = text
        elif important or time.monotonic() - self._last >= _PLAIN_SECONDS:
            self._last = time.monotonic()
            print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        """Take the live line away."""
        if self._shown:
            self.stream.write("\r" + " " * len(self._shown) + "\r")
            self.stream.flush()
            self._shown = ""


def duration(seconds: float) -> str:
    """ "3 min 20 s", as people say it."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def resident_memory() -> float:
    """Memory that this process holds now, in GB (its peak where the system does not tell)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a file on a disk
            pages = int(file.read().split()[1])
        import os

        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e9 if sys.platform == "darwin" else 1e6)
