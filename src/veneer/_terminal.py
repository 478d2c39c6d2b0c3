"""Text for a terminal: lines broken between words, a status line, a progress bar. Elsewhere, text is printed as it is."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

_status: list[str] = []
"""Status lines that are shown now, the innermost last."""

_BAR = 20


def counted(number: int, word: str) -> str:
    """A number with its noun: 1 row, 1,000 rows."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def is_terminal(stream: TextIO) -> bool:
    """Tell if a stream is an open terminal."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def wrapped(text: str, stream: TextIO) -> str:
    """Break long lines between words if the stream is a terminal; continuation lines are indented."""
    if not is_terminal(stream):
        return text
    width = max(40, shutil.get_terminal_size().columns - 1)
    return "\n".join(line if len(line) <= width else _fill(line, width) for line in text.splitlines())


def _fill(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def fitted(parts: Sequence[str], width: int) -> str:
    """Join as many parts as fit into the width, in order, so that none is cut."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text or parts[0][:width]


def bar(fraction: float, width: int = _BAR) -> str:
    """A progress bar with its percentage.

    >>> bar(0.5, 8)
    '####----  50 %'
    """
    fraction = min(1.0, max(0.0, fraction))
    done = int(fraction * width)
    return f"{'#' * done}{'-' * (width - done)} {int(100 * fraction):>3} %"


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show a line on the terminal while something takes time, and remove it afterwards; prints nothing elsewhere."""
    stream = sys.stderr
    if not is_terminal(stream):
        yield
        return
    shown = f"{text} ..."[: shutil.get_terminal_size().columns - 1]
    _status.append(shown)
    _write(stream, shown)
    try:
        yield
    finally:
        _status.pop()
        _write(stream, "\r" + " " * len(shown) + "\r")


def note(text: str) -> None:
    """Print a line to the error stream, above the status line if there is one."""
    shown = _status[-1] if _status else ""
    blank = "\r" + " " * len(shown) + "\r" if shown else ""
    _write(sys.stderr, f"{blank}{text}\n{shown}")


def _write(stream: TextIO, text: str) -> None:
    with suppress(OSError, ValueError):
        stream.write(text)
        stream.flush()
