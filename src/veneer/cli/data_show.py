"""``veneer data show FILE``: show rows as the model sees them, with the trained tokens marked."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from veneer._terminal import counted
from veneer.cli._parser import at_least
from veneer.cli._row_arguments import add_row_arguments, format_of, pairs_of, renderer_of
from veneer.errors import DataError

if TYPE_CHECKING:
    from veneer.data.chat.render import Rendered
    from veneer.data.preview import ShownToken


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_row_arguments(parser)
    parser.add_argument("-n", type=at_least(1), default=3, metavar="N", help="number of rows to show (default: 3)")
    parser.add_argument("--skip", type=at_least(0), default=0, metavar="N", help="number of rows to skip first")
    parser.add_argument("--ids", action="store_true", help="print one token per line, with its id")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained HTML page instead")


def run(args: argparse.Namespace) -> int:
    """Print the rows, or write them as a page; the exit code is 1 if one of them is unusable."""
    columns, roles = pairs_of("--columns", args.columns), pairs_of("--roles", args.roles)
    from veneer.data.rows.readers import splits
    from veneer.data.rows.shapes import RowReader

    rows = RowReader(splits(args.file)["train"], format=format_of(args), columns=columns, roles=roles)
    renderer = renderer_of(args)
    from veneer.data.check import CheckReport, RowChecks, warning_lines
    from veneer.data.preview import shown_tokens
    from veneer.data.rows.row import BadRow

    shown: list[tuple[Rendered, list[ShownToken]]] = []
    bad = []
    chosen = islice(rows, args.skip, args.skip + args.n)
    report = CheckReport()
    checks = RowChecks(report, renderer)
    for row, found in renderer.render_many(chosen):
        if isinstance(found, BadRow):
            bad.append(found)
        else:
            if row is not None:
                checks.add(row, found)
            shown += [(rendered, shown_tokens(rendered, renderer.encoder)) for rendered in found]
    if not shown and not bad:
        raise DataError(f"{args.file}: there is no row after the first {args.skip}")
    notices = [*rows.notices(), *renderer.notices(rows.shape.format)]
    if args.html:
        _write_page(Path(args.html), shown, rows.path.name, notices)
        print(f"{args.html}: {counted(len(shown), 'example')}")
    else:
        print("\n".join(notices))
        _print(shown, ids=args.ids)
        for line in warning_lines(report):
            print(f"\nwarning: {line}")
    untrained = [rendered.source for rendered, _ in shown if not rendered.trained]
    problems = [*map(str, bad), *(f"{source}: nothing to learn: none of its tokens is trained" for source in untrained)]
    for problem in problems:
        print(f"\nunusable: {problem}")
    return 1 if problems else 0


def _print(shown: list[tuple[Rendered, list[ShownToken]]], *, ids: bool) -> None:
    from veneer.data.preview import id_lines, plain_text, rich_text, summary

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if not colour and not ids:
        print("trained tokens are between [[ and ]]")
    for rendered, tokens in shown:
        print(f"\n{summary(rendered)}")
        if ids:
            print("\n".join(id_lines(tokens)))
        elif colour:
            from rich.console import Console

            Console(highlight=False, soft_wrap=True).print(rich_text(tokens))
        else:
            print(plain_text(tokens))


def _write_page(path: Path, shown: list[tuple[Rendered, list[ShownToken]]], title: str, notices: list[str]) -> None:
    from veneer._files import replace_text
    from veneer.data.preview import html_page

    try:
        replace_text(path, html_page(shown, title, notices))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; choose another file with --html") from error
