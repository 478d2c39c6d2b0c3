"""``veneer plan --base MODEL --memory 24GB``: the settings of a run that fit, without weights or examples."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

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
        shape = shape_of(config_folder(base, given.get("revision")), method)
        rows = settings(shape, memory, method, ranks)
        chosen = best(rows)
    data = " ".join(args.source) or "DATA"
    out = ["--method", method] if "method" in given else []
    command = None if chosen is None else " ".join(["veneer train", data, "--base", base, *out, *chosen.flags()])
    if args.json:
        found = [row.as_dict() for row in rows]
        print(as_json({"base": base, "parameters": shape.linear + shape.other, "settings": found, "command": command}))
        return int(chosen is None)
    print(f"{base}: {(shape.linear + shape.other) / 1e9:.2f} billion parameters; {method}, estimated without weights")
    header = ["base", "r", "checkpointing", "tokens per pass", "memory"]
    print("\n".join(line.rstrip() for line in table(header, [_cells(row) for row in rows])))
    print(f"\n{command}" if command else f"\nnothing fits into {args.memory}; take a smaller base or more memory")
    return int(chosen is None)


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
