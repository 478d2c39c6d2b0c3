"""Console output of a run: one live line on a terminal, plain lines elsewhere.

Without a terminal, the first and the last step are printed, and at most one line every few seconds in between.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from veneer._terminal import bar, fitted, is_terminal, wrapped

_PLAIN_SECONDS = 5.0


class Console:
    """Prints the progress of a run. ``quiet`` prints nothing."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream or sys.stdout
        self.quiet = quiet
        self.live = not quiet and is_terminal(self.stream)
        """Progress overwrites one line."""
        self._shown = ""
        self._bar: list[str] = []
        self._last = 0.0

    def line(self, text: str) -> None:
        """Print a line."""
        if self.quiet:
            return
        self.clear()
        print(wrapped(text, self.stream), file=self.stream, flush=True)

    def advance(self, fraction: float) -> None:
        """Set the fraction of the work that is done, which the live line shows as a bar."""
        self._bar = [bar(fraction)]

    def progress(self, text: str, *, important: bool = False) -> None:
        """Overwrite the live line; without a terminal, print a line if it is important or the last one is a few seconds old.

        The live line leaves out the last parts of the text, between double spaces, where the terminal is too narrow.
        """
        if self.quiet:
            return
        if self.live:
            text = fitted([*self._bar, *text.split("  ")], shutil.get_terminal_size().columns - 1)
            self.stream.write("\r" + text.ljust(len(self._shown)))
            self.stream.flush()
            self._shown = text
        elif important or time.monotonic() - self._last >= _PLAIN_SECONDS:
            self._last = time.monotonic()
            print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        """Erase the live line."""
        if self._shown:
            self.stream.write("\r" + " " * len(self._shown) + "\r")
            self.stream.flush()
            self._shown = ""


def duration(seconds: float) -> str:
    """A duration in words.

    >>> duration(200)
    '3 min 20 s'
    """
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
