"""``veneer data check FILE``: what is wrong or remarkable about a file of examples; exit code 1 if a row is unusable."""

from __future__ import annotations

import argparse
import json

from veneer.cli._data import add_row_arguments, pairs_of, renderer_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_row_arguments(parser)
    parser.add_argument("--valid", metavar="FILE", help="held-out examples, none of which may be among the others")
    parser.add_argument("--json", action="store_true", help="the whole report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    columns, roles = pairs_of("--columns", args.columns), pairs_of("--roles", args.roles)
    from veneer.data.rows.readers import splits

    found = splits(args.file)
    valid = [splits(args.valid)["train"]] if args.valid else [found["valid"]] if "valid" in found else []
    renderer = renderer_of(args)
    from veneer.data.check import check_files, report_lines

    report = check_files([found["train"]], renderer, valid=valid, format=args.format, columns=columns, roles=roles)
    if args.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2))
    else:
        print("\n".join(report_lines(report)))
    return 0 if report.usable else 1
