"""``veneer plan --base MODEL --memory 24GB``: the settings of a run that fit, without weights or examples.

Where the weights are on this machine and the base is small, the table has measured times too.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._terminal import status
from veneer.cli._output import as_json, table
from veneer.cli.merge import parse_size
from veneer.config import given_flags

if TYPE_CHECKING:
    from veneer.training.planning.fitting import Setting


def show_what_fits(args: argparse.Namespace) -> int:
    """Print the table and the command of its best row; the exit code is 1 if nothing fits."""
    from veneer.models.load import config_folder
    from veneer.training.planning.fitting import best, settings, shape_of

    given = given_flags(args)
    base, method = str(given.get("base", "smollm2-135m")), str(given.get("method", "lora"))
    ranks = [int(given["r"])] if "r" in given else [16, 64]
    memory = parse_size(args.memory, "--memory")
    with status(f"reading the config of {base}"):
        folder = config_folder(base, given.get("revision"))
        shape = shape_of(folder, method)
        rows = settings(shape, memory, method, ranks)
        chosen = best(rows)
    if given.get("plan") is not False:
        rows = _timed(rows, folder, shape.linear + shape.other, method, given)
    data = " ".join(args.source) or "DATA"
    out = ["--method", method] if "method" in given else []
    command = None if chosen is None else " ".join(["veneer train", data, "--base", base, *out, *chosen.flags()])
    if args.json:
        found = [asdict(row) for row in rows]
        print(as_json({"base": base, "parameters": shape.linear + shape.other, "settings": found, "command": command}))
        return int(chosen is None)
    print(f"{base}: {_parameters(shape.linear + shape.other)} parameters; {method}, memory estimated without weights")
    header, cells = ["base", "r", "checkpointing", "tokens per pass", "memory"], [_cells(row) for row in rows]
    if any(row.seconds is not None for row in rows):
        header.append("1,000 tokens here")
        cells = [
            [*line, "" if row.seconds is None else f"{row.seconds:.2f} s"]
            for line, row in zip(cells, rows, strict=True)
        ]
    print("\n".join(line.rstrip() for line in table(header, cells)))
    print(f"\n{command}" if command else f"\nnothing fits into {args.memory}; take a smaller base or more memory")
    return int(chosen is None)


def _timed(rows: list[Setting], folder: Path, parameters: int, method: str, given: dict[str, Any]) -> list[Setting]:
    """The rows with the times of passes, where the weights are on this machine and the base is small enough to be measured."""
    from dataclasses import replace

    from veneer.training.planning.probe import LARGEST, measure_times

    if parameters > LARGEST or not any(folder.glob("*.safetensors")):
        return rows
    with status("measuring passes on random tokens (--no-plan leaves it out)"):
        times = measure_times(folder, method, sorted({row.r for row in rows}), given.get("device", "auto"))
    return [replace(row, seconds=times.get((row.quantize, row.r, row.checkpointing))) for row in rows]


def _cells(row: Setting) -> list[str]:
    size = f"{row.memory / 1e9:.2f} GB"
    tokens = f"{row.tokens:,}"
    return [
        row.quantize,
        str(row.r),
        "yes" if row.checkpointing else "no",
        tokens,
        size if row.fits else f"{size}, too much",
    ]


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.1f} million"
