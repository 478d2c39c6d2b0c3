"""``veneer runs [DIR]``: every run below a folder, with state, step, losses and where its adapter lies."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from veneer.cli._runs import Row, as_dict, list_runs
from veneer.cli._table import table

_HEADER = ("run", "job", "state", "step", "loss", "held out", "best", "adapter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="where the runs are (default: runs)")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list; an empty one says so."""
    rows = list_runs(Path(args.folder))
    if args.json:
        print(json.dumps([as_dict(row) for row in rows], indent=2, ensure_ascii=False))
        return 0
    if not rows:
        print(f"{args.folder} holds no runs; veneer train DATA --out {Path(args.folder) / 'NAME'} begins one")
        return 0
    several = {path for path, count in Counter(row.run for row in rows).items() if count > 1}
    for line in table(_HEADER, [_cells(row, several) for row in rows]):
        print(line.rstrip())
    for row in rows:
        if row.reason:
            print(f"{row.run} {row.job}: {row.reason}")
    return 0


def _cells(row: Row, several: set[str]) -> list[str]:
    job = row.job if row.run in several or row.job != Path(row.run).name else ""
    losses = [_number(value) for value in (row.loss, row.held_out, row.best)]
    return [row.run, job, row.state, str(row.step), *losses, row.adapter or "-"]


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
