"""Arguments that say how rows are read and turned into tokens; shared by ``data check``, ``data show`` and ``evaluate``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from veneer._terminal import status
from veneer.cli._parser import at_least
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.data.chat.render import Renderer

TASKS = {"sft": "auto", "dpo": "preference", "orpo": "preference", "kto": "unpaired"}
"""The format of the rows of each task."""
FORMATS = ("auto", "messages", "sharegpt", "prompt", "alpaca", "text")


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the file, the base and how rows are read and rendered."""
    parser.add_argument("file", metavar="FILE", help="jsonl, json, csv or tsv (also .gz), parquet, or a folder")
    parser.add_argument(
        "--base", metavar="MODEL", default="smollm2-135m", help="base whose tokenizer and chat template are used"
    )
    add_task_argument(parser)
    add_format_arguments(parser)
    parser.add_argument("--roles", metavar="TAG=ROLE", default="", help="map sharegpt tags to roles: npc=assistant")
    parser.add_argument(
        "--train-on", choices=("assistant", "last", "all"), default="assistant", help="turns whose tokens are trained"
    )
    parser.add_argument(
        "--max-length", type=at_least(2), metavar="N", help="maximum tokens per example (default: the base's context)"
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="chat template instead of the base's: a Jinja file, chatml, chatml-tools, or a name of the tokenizer's own",
    )
    parser.add_argument(
        "--parse-specials", action="store_true", help="encode control strings in plain text rows as control tokens"
    )


def add_task_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--task``."""
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="sft",
        help="task that the rows are for; dpo and orpo take preferences, kto answers with a label (default: sft)",
    )


def format_of(args: argparse.Namespace) -> str:
    """The format of the rows: that of the task, or else of ``--format``.

    Raises:
        ConfigError: both are given.
    """
    if args.task == "sft":
        return str(args.format)
    if args.format != "auto":
        raise ConfigError(f"--format {args.format}: task {args.task} reads rows of its own shape; leave out --format")
    return TASKS[args.task]


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--format`` and ``--columns``."""
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="format of the rows (default: detected from their columns)"
    )
    parser.add_argument(
        "--columns", metavar="NAME=COLUMN", default="", help="rename columns: prompt=question,completion=answer"
    )


def pairs_of(flag: str, given: str) -> dict[str, str]:
    """Parse ``a=b,c=d``.

    Raises:
        ConfigError: The text has another form.
    """
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in given.split(","))):
        name, sign, value = (text.strip() for text in part.partition("="))
        if not (name and sign and value):
            raise ConfigError(f"{flag}: expected NAME=NAME,NAME=NAME, found {part!r}")
        found[name] = value
    return found


@status("loading the tokenizer")
def renderer_of(args: argparse.Namespace) -> Renderer:
    """Build the renderer for the arguments, with the base's tokenizer."""
    from veneer.data.chat.render import Renderer, RenderOptions
    from veneer.data.chat.template import read_template
    from veneer.models.load import context_length, load_tokenizer, vocab_size

    tokenizer = load_tokenizer(args.base)
    template = None if args.chat_template is None else read_template(args.chat_template, tokenizer)
    options = RenderOptions(
        train_on=args.train_on,
        max_length=args.max_length or context_length(args.base) or _model_max_length(tokenizer),
        chat_template=template,
        parse_specials=args.parse_specials,
        vocab_size=vocab_size(args.base),
    )
    return Renderer(tokenizer, options)


def _model_max_length(tokenizer: Any) -> int | None:
    length = getattr(tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and 2 <= length < 1 << 24 else None  # a huge number means no limit
