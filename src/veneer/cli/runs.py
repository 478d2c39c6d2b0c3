"""``veneer runs [DIR]``: every run below a folder, with state, step, losses and where its adapter lies.

``veneer runs runs/both --pause sql`` asks a run for a change of one of its jobs (``*`` means all); it is done between two rounds, or when
the run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from veneer.cli._runs import Row, as_dict, list_runs
from veneer.cli._table import table
from veneer.errors import CheckpointError

_VERBS = {
    "pause": "let a job of the run DIR stand where it is",
    "resume": "let a paused job go on",
    "cancel": "end a job for good; its state stays in the checkpoints",
}
_HEADER = ("run", "job", "state", "step", "loss", "held out", "best", "adapter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="where the runs are (default: runs)")
    for verb, what in _VERBS.items():
        parser.add_argument(f"--{verb}", metavar="JOB", help=what)
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list; an empty one says so."""
    rows = list_runs(Path(args.folder))
    asked = {verb: getattr(args, verb) for verb in _VERBS if getattr(args, verb) is not None}
    if asked:
        return _ask(Path(args.folder), rows, asked)
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


def _ask(out: Path, rows: list[Row], asked: dict[str, str]) -> int:
    """Leave requests in a run's folder.

    Raises CheckpointError where the folder is not one run, or has no such job that goes on.
    """
    going = [row.job for row in rows if row.run == str(out) and row.state in ("running", "interrupted", "paused")]
    if not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is not a run; name the run's own folder, as veneer runs lists it")
    for job in asked.values():
        if job != "*" and job not in going:
            have = ", ".join(going) or "none"
            raise CheckpointError(f'{out} has no job "{job}" that goes on; those that do: {have}')
    from veneer.training.run.control import ask

    live = any(row.state == "running" for row in rows if row.run == str(out))
    for verb, job in asked.items():
        ask(out, job, verb)  # type: ignore[arg-type]
        when = "after this round" if live else "when the run goes on (the same veneer train again)"
        print(f"{out}: {verb} {'all jobs' if job == '*' else job}, {when}")
    return 0


def _cells(row: Row, several: set[str]) -> list[str]:
    job = row.job if row.run in several or row.job != Path(row.run).name else ""
    losses = [_number(value) for value in (row.loss, row.held_out, row.best)]
    return [row.run, job, row.state, str(row.step), *losses, row.adapter or "-"]


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
