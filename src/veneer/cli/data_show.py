"""``veneer data show FILE``: rows as the model will see them, with the trained tokens marked."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli._data import add_row_arguments, pairs_of, renderer_of
from veneer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from veneer.data.chat.render import Rendered
    from veneer.data.preview import ShownToken


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_row_arguments(parser)
    parser.add_argument("-n", type=int, default=3, metavar="N", help="how many rows (default: 3)")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="rows to pass over first")
    parser.add_argument("--ids", action="store_true", help="one token a line, with its id")
    parser.add_argument("--html", metavar="OUT", help="write a page instead, one file that needs nothing else")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.n < 1 or args.skip < 0:
        raise ConfigError(f"-n must be at least 1 and --skip at least 0, found {args.n} and {args.skip}")
    columns, roles = pairs_of("--columns", args.columns), pairs_of("--roles", args.roles)
    from veneer.data.rows.readers import splits
    from veneer.data.rows.shapes import RowReader

    rows = RowReader(splits(args.file)["train"], format=args.format, columns=columns, roles=roles)
    renderer = renderer_of(args)
    from veneer.data.preview import shown_tokens
    from veneer.data.rows.row import BadRow

    shown: list[tuple[Rendered, list[ShownToken]]] = []
    bad = []
    chosen = islice(rows, args.skip, args.skip + args.n)
    for _, found in renderer.render_many(chosen):
        if isinstance(found, BadRow):
            bad.append(found)
        else:
            shown += [(rendered, shown_tokens(rendered, renderer.encoder)) for rendered in found]
    if not shown and not bad:
        raise DataError(f"{args.file}: there is no row behind the first {args.skip}")
    notices = [*rows.notices(), *renderer.notices(rows.shape.format)]
    if args.html:
        _write_page(Path(args.html), shown, rows.path.name, notices)
        print(f"{args.html}: {len(shown)} examples")
    else:
        print("\n".join(notices))
        _print(shown, ids=args.ids)
    nothing = [rendered.source for rendered, _ in shown if not rendered.trained]
    for reason in [
        *map(str, bad),
        *(f"{source}: nothing to learn: none of its tokens is trained" for source in nothing),
    ]:
        print(f"\nunusable: {reason}")
    return 1 if bad or nothing else 0


def _print(shown: list[tuple[Rendered, list[ShownToken]]], *, ids: bool) -> None:
    from veneer.data.preview import id_lines, plain_text, rich_text, summary

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if not colour and not ids:
        print("trained tokens stand between [[ and ]]")
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
        raise DataError(f"{path} cannot be written: {error.strerror}; choose another path with --html") from error
