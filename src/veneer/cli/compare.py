"""``veneer compare DATA --method lora,dora,full --r 4,16 --test FILE``: compare methods and options on one data set.

The learning rate of every combination is searched on held-out rows; the winners are trained with every seed and measured on the test rows.
Rerun the same command to resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from veneer._terminal import status
from veneer.cli import train
from veneer.cli._output import as_json, print_lines, table
from veneer.cli._parser import add_json
from veneer.config import TrainOptions, add_flags
from veneer.data.rows.hub_sets import hub_set
from veneer.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``veneer train``, ``--test`` and ``--json``."""
    parser.add_argument("source", nargs="*", metavar="DATA|CONFIG", help="files of examples, or a YAML file of options")
    parser.add_argument(
        "--test",
        type=Path,
        metavar="FILE",
        help="rows for the final measurement; the search never reads them (required)",
    )
    add_json(parser, "print the result as JSON")
    add_flags(parser, TrainOptions)


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, and write compare.json and compare.html."""
    options, _ = train.resolve_source(args)
    if args.test is None:
        raise ConfigError("the rows of the final measurement are missing; give --test FILE, apart from --valid")
    if not args.test.is_file() and hub_set(args.test) is None:
        raise ConfigError(f"--test {args.test}: there is no such file")
    with status("loading"):
        import sys

        from veneer.training.compare import compare
        from veneer.training.compare.report import cells, header, notes, write_html
        from veneer.training.compare.study import RESULT, as_dict
        from veneer.training.run.console import Console
    console = Console(sys.stderr)
    result = compare(options, args.test, seeds=options.sweep.get("seed", [options.seed]), console=console)
    page = write_html(result)
    if args.json:
        print(as_json(as_dict(result)))
        return 0
    print("\n".join(line.rstrip() for line in table(header(result), cells(result))))
    print_lines([*(f"note: {line}" for line in notes(result)), f"wrote {result.out / RESULT}, {page}"])
    return 0
