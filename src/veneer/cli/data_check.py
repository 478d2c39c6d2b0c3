"""``veneer data check FILE``: report problems of a file of examples; the exit code is 1 if a row is unusable."""

from __future__ import annotations

import argparse

from veneer._terminal import status
from veneer.cli._output import as_json, print_lines
from veneer.cli._parser import add_json
from veneer.cli._row_arguments import add_row_arguments, format_of, pairs_of, renderer_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_row_arguments(parser)
    parser.add_argument("--valid", metavar="FILE", help="held-out examples; duplicates of training rows are reported")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    columns, roles = pairs_of("--columns", args.columns), pairs_of("--roles", args.roles)
    format = format_of(args)
    from veneer.data.rows.readers import splits
    from veneer.data.rows.shapes import RowReader

    found = splits(args.file)
    valid = [splits(args.valid)["train"]] if args.valid else [found["valid"]] if "valid" in found else []
    for path in (found["train"], *valid):  # a wrong column is reported before transformers is imported
        RowReader(path, format=format, columns=columns, roles=roles)
    renderer = renderer_of(args)
    from veneer.data.chat.stops import other_ends, taught_stops
    from veneer.data.check import check_files, report_lines
    from veneer.models.load import end_ids

    report = status("checking")(check_files)(
        [found["train"]], renderer, valid=valid, format=format, columns=columns, roles=roles
    )
    if ends := other_ends(renderer.tokenizer, taught_stops(renderer, report.load.stops), end_ids(args.base)):
        report.load.notices.append(ends)
    if args.json:
        print(as_json(report.as_dict()))
    else:
        print_lines(report_lines(report))
    return 0 if report.usable else 1
