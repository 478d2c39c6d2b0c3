"""What ``veneer data check`` and ``veneer data show`` share: which rows to read and how they become tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.data.chat.render import Renderer

FORMATS = ("auto", "messages", "sharegpt", "prompt", "alpaca", "text")


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what the rows mean and how they are rendered."""
    parser.add_argument("file", metavar="FILE", help="jsonl, json, csv, tsv (each also .gz) or parquet, or a folder")
    parser.add_argument(
        "--base", metavar="MODEL", default="smollm2-135m", help="the base whose tokenizer and template count"
    )
    parser.add_argument("--format", choices=FORMATS, default="auto", help="shape of the rows (default: by columns)")
    parser.add_argument(
        "--columns", metavar="OURS=YOURS", default="", help="other column names: prompt=question,completion=answer"
    )
    parser.add_argument("--roles", metavar="TAG=ROLE", default="", help="roles of other sharegpt tags: npc=assistant")
    parser.add_argument(
        "--train-on", choices=("assistant", "last", "all"), default="assistant", help="which tokens are learnt"
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens of an example (default: the base's)")
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template to use instead of the base's")
    parser.add_argument(
        "--parse-specials", action="store_true", help="control strings in plain text rows are control tokens"
    )


def pairs_of(flag: str, given: str) -> dict[str, str]:
    """``a=b,c=d`` as a mapping; raises ConfigError for anything else."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in given.split(","))):
        name, sign, value = (text.strip() for text in part.partition("="))
        if not (name and sign and value):
            raise ConfigError(f"{flag}: expected NAME=NAME,NAME=NAME, found {part!r}")
        found[name] = value
    return found


def renderer_of(args: argparse.Namespace) -> Renderer:
    """The renderer that the arguments ask for, with the base's tokenizer."""
    if args.max_length is not None and args.max_length < 2:
        raise ConfigError(f"--max-length: expected at least 2, found {args.max_length}")
    from veneer.data.chat.render import Renderer, RenderOptions
    from veneer.data.chat.template import read_template
    from veneer.models.load import context_length, load_tokenizer

    template = None if args.chat_template is None else read_template(Path(args.chat_template))

    tokenizer = load_tokenizer(args.base)
    options = RenderOptions(
        train_on=args.train_on,
        max_length=args.max_length or context_length(args.base) or _longest(tokenizer),
        chat_template=template,
        parse_specials=args.parse_specials,
    )
    return Renderer(tokenizer, options)


def _longest(tokenizer: Any) -> int | None:
    longest = getattr(tokenizer, "model_max_length", None)
    return longest if isinstance(longest, int) and 2 <= longest < 1 << 24 else None  # no bound is told as a huge one
