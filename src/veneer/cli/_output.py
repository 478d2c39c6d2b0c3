"""Tables, percentages and JSON for the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from veneer._terminal import wrapped


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table as lines; the first column is left-aligned, the others are right-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]


def print_lines(lines: Iterable[str]) -> None:
    """Print lines; on a terminal, long ones are broken between words."""
    print(wrapped("\n".join(lines), sys.stdout))


@contextmanager
def counting(what: str, total: int, unit: str, part: tuple[int, int] = (0, 1)) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many of ``total`` are done, for work that is part ``part[0]`` of ``part[1]``; yields the function to call."""
    from veneer.training.run.console import Console

    console = Console(sys.stderr)

    def show(done: int) -> None:
        if console.live:
            console.advance((part[0] + done / total) / part[1])
            console.progress(f"{what}  {done} of {total} {unit}")

    try:
        yield show
    finally:
        console.clear()


def percent(fraction: float) -> str:
    """Format a fraction as a percentage, with enough digits to tell it from 0 % and 100 %."""
    distance = min(abs(fraction), abs(1 - fraction))
    if distance < 5e-7:
        return f"{fraction:.0%}"
    return f"{fraction:.1%}" if distance >= 1e-3 else f"{fraction:.3%}" if distance >= 1e-5 else f"{fraction:.5%}"


def difference_from(exact: str, error: float) -> str:
    """Say in words how far a result is from the exact one, which ``exact`` names: "differs from ... by 2.1%"."""
    if error < 1e-6:
        return f"equals {exact} up to rounding"
    return f"differs from {exact} by {percent(error)}"


def as_json(value: Any) -> str:
    """Format plain data as indented JSON; numbers that are not finite become null, which every parser accepts."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
