"""Plain tables and numbers for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]


def percent(share: float) -> str:
    """A share as a percentage with as many digits as it takes to tell it from 0 and 100."""
    if share == 0 or abs(share - 1) < 5e-7:
        return f"{share:.0%}"
    lacking = min(abs(share), abs(1 - share))
    return (
        f"{share:.1%}"
        if lacking >= 1e-3
        else f"{share:.3%}"
        if lacking >= 1e-5
        else f"{100 * share:.1e} %"
        if share < 0.5
        else "100%"
    )
