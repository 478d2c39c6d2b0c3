"""``veneer evaluate TARGET... --data FILE``: held-out loss of the base and of each adapter, compared example by example."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._data import FORMATS, pairs_of
from veneer.cli._json import as_json
from veneer.cli._target import add_target_arguments, load_targets
from veneer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from veneer.adapters.runtime.route import RouteLike
    from veneer.data.example import Example
    from veneer.models.load import Base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_target_arguments(parser, several=True)
    parser.add_argument("--data", metavar="FILE", help="held-out examples, in any shape that training takes")
    parser.add_argument("--general", action="store_true", help="judge a general text too: what did the adapter forget?")
    parser.add_argument(
        "--general-text", metavar="FILE", help="another general text (default: Python's own documentation)"
    )
    parser.add_argument(
        "--mix",
        action="append",
        default=[],
        metavar="A:W,B:W",
        help="a weighted mix of the adapters, as a row of its own",
    )
    parser.add_argument(
        "--against",
        default="base",
        metavar="NAME",
        help="the adapter or mix that the others are compared with (default base)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples")
    parser.add_argument("--max-length", type=int, metavar="N", help="cut longer examples at their end")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="shape of the rows (default: by columns)")
    parser.add_argument(
        "--columns", metavar="OURS=YOURS", default="", help="other column names: prompt=question,completion=answer"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.data is None and not (args.general or args.general_text):
        raise ConfigError("nothing to judge on: give --data FILE, or --general")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit: expected 1 or more, found {args.limit}")
    from veneer.evaluate.losses import compare, example_losses
    from veneer.models.flat import FlatRunner

    loaded = load_targets(args.target, args.base, args.dtype, purpose="train", force=args.force)
    routes: dict[str, RouteLike] = {
        "base": None,
        **{name: name for name in loaded.names},
        **_mixes(args.mix, loaded.names),
    }
    if args.against not in routes:
        raise ConfigError(f"--against {args.against}: it is not judged here; there is: {', '.join(routes)}")
    runner = FlatRunner(loaded.base.model)
    report: dict[str, Any] = {"base_model": loaded.base.name, "against": args.against, "sets": {}}
    for label, examples in _sets(args, loaded.base).items():
        results = {
            name: example_losses(runner, examples, bank=loaded.bank, route=route) for name, route in routes.items()
        }
        rows = {}
        for name, losses in results.items():
            rows[name] = {"loss": losses.mean, "perplexity": losses.perplexity}
            if name != args.against:
                apart = compare(losses, results[args.against])
                rows[name] |= {f"against_{args.against}": apart.mean, "low": apart.low, "high": apart.high}
        report["sets"][label] = {
            "examples": len(examples),
            "tokens": sum(example.trained for example in examples),
            "routes": rows,
        }
        if not args.json:
            _show(label, report["sets"][label], args.against)
    if args.json:
        print(as_json(report))
    return 0


def _sets(args: argparse.Namespace, base: Base) -> dict[str, list[Example]]:
    from veneer.evaluate.general import general_text, pieces

    sets: dict[str, list[Example]] = {}
    if args.data is not None:
        sets[args.data] = _examples(args, base)
    if args.general or args.general_text:
        text = _text(Path(args.general_text)) if args.general_text else general_text()
        sets["general text"] = pieces(text, base.tokenizer)
    return sets


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--general-text {file} cannot be read as UTF-8 text: {error}") from None


def _examples(args: argparse.Namespace, base: Base) -> list[Example]:
    from veneer.data.chat.render import Renderer, RenderOptions
    from veneer.data.dataset import load_examples
    from veneer.training.run.setup import context_of

    length = min(context_of(base), args.max_length or context_of(base))
    renderer = Renderer(base.tokenizer, RenderOptions(max_length=length))
    columns = pairs_of("--columns", args.columns)
    examples, report = load_examples([args.data], renderer, format=args.format, columns=columns, truncate="end")
    if report.cut:
        print(f"{args.data}: {report.cut:,} rows were cut at {length:,} tokens", file=sys.stderr)
    return examples[: args.limit]


def _mixes(given: list[str], names: list[str]) -> dict[str, dict[str, float]]:
    mixes: dict[str, dict[str, float]] = {}
    for text in given:
        mix: dict[str, float] = {}
        for part in text.split(","):
            name, colon, weight = part.partition(":")
            if name not in names:
                raise ConfigError(f"--mix {text}: {name!r} is not loaded; there is: {', '.join(names) or 'no adapter'}")
            try:
                mix[name] = float(weight) if colon else 1.0
                if not math.isfinite(mix[name]):
                    raise ValueError(weight)
            except ValueError:
                raise ConfigError(f"--mix {text}: {weight!r} is no weight; write NAME:0.5") from None
        mixes[text] = mix
    return mixes


def _show(label: str, entry: dict[str, Any], against: str) -> None:
    print(f"{label}: {entry['examples']} examples, {entry['tokens']} tokens")
    width = max(len(name) for name in entry["routes"])
    for name, row in entry["routes"].items():
        line = f"  {name:<{width}}  loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}"
        if f"against_{against}" in row:
            line += (
                f"  against {against} {row[f'against_{against}']:+.4f} (95 %: {row['low']:+.4f} to {row['high']:+.4f})"
            )
        print(line)
