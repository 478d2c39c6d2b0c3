"""``veneer evaluate TARGET... --data FILE``: held-out losses of the base, its adapters and mixes, compared in pairs; scores of heads."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._files import decode
from veneer._terminal import counted, status
from veneer.cli._output import as_json, counting
from veneer.cli._parser import add_json, at_least
from veneer.cli._row_arguments import add_format_arguments, add_task_argument, format_of, pairs_of
from veneer.cli._targets import LoadedTargets, add_target_arguments, load_targets
from veneer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from veneer.adapters.runtime.route import RouteLike
    from veneer.data.example import Example
    from veneer.models.load import Base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_target_arguments(parser, several=True)
    parser.add_argument("--data", metavar="FILE", help="held-out examples, in any format that training accepts")
    parser.add_argument("--general", action="store_true", help="also evaluate a general text, to measure forgetting")
    parser.add_argument(
        "--general-text", metavar="FILE", help="general text to use (default: Python's own documentation)"
    )
    parser.add_argument(
        "--mix",
        action="append",
        default=[],
        metavar="A:W,B:W",
        help="also evaluate this weighted mix of the adapters; repeat for several",
    )
    parser.add_argument(
        "--against",
        default="base",
        metavar="NAME",
        help="adapter or mix that the others are compared with (default: base)",
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="also generate answers to the prompts of the examples and score them: BLEU, ROUGE-L, chrF, exact match",
    )
    parser.add_argument(
        "--max-tokens",
        type=at_least(1),
        default=128,
        metavar="N",
        help="maximum tokens of these answers (default: 128)",
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="evaluate only the first N examples")
    parser.add_argument("--max-length", type=at_least(2), metavar="N", help="truncate longer examples at their end")
    add_task_argument(parser)
    parser.add_argument(
        "--beta", type=float, default=0.1, help="beta of --task dpo, orpo or kto, as in training (default: %(default)s)"
    )
    add_format_arguments(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the losses of every route on every set of examples."""
    if args.data is None and not (args.general or args.general_text):
        raise ConfigError("no examples given; use --data FILE or --general")
    if args.generate and args.data is None:
        raise ConfigError("--generate answers the prompts of examples; give them with --data FILE")
    from veneer.models.flat import FlatRunner

    if args.task != "sft" and args.against != "base":
        raise ConfigError(f"--against compares losses of tokens, and --task {args.task} has none; leave it out")
    loaded = load_targets(args, purpose="train")
    if loaded.task != "sft":
        return _evaluate_heads(args, loaded)
    routes: dict[str, RouteLike] = {
        "base": None,
        **{name: name for name in loaded.names},
        **_mixes(args.mix, loaded.names),
    }
    if args.against not in routes:
        raise ConfigError(f"--against {args.against}: not evaluated here; available: {', '.join(routes)}")
    runner = FlatRunner(loaded.base.model)
    report: dict[str, Any] = {"base_model": loaded.base.name, "against": args.against, "sets": {}}
    for label, examples in _sets(args, loaded.base).items():
        report["sets"][label] = {
            "examples": len(examples),
            "tokens": sum(example.trained for example in examples),
            "routes": _losses(runner, examples, loaded.bank, routes, args, args.task if label == args.data else "sft"),
        }
        if not args.json:
            print("\n".join(_lines(label, report["sets"][label], args.against)))
    if args.generate:
        report["answers"] = _generated(args, loaded, routes)
    if args.json:
        print(as_json(report))
    return 0


def _generated(
    args: argparse.Namespace, loaded: LoadedTargets, routes: Mapping[str, RouteLike]
) -> dict[str, dict[str, Any]]:
    """Return the scores of generated answers by route, and print them unless JSON is asked for."""
    from veneer.cli._answers import answer_lines, prompts_of, score_answers

    chats = getattr(loaded.base.tokenizer, "chat_template", None) is not None
    found = prompts_of(args.data, args.format, pairs_of("--columns", args.columns), chats=chats)
    prompts = list(found.values())[: args.limit]
    scores = score_answers(loaded, routes, prompts, args.max_tokens)
    if not args.json:
        print("\n".join(answer_lines(scores, len(prompts))))
    return scores


def _evaluate_heads(args: argparse.Namespace, loaded: LoadedTargets) -> int:
    """Print the scores of adapters with heads on labelled rows."""
    from veneer.cli._labelled import score_all, score_lines

    general = args.general or args.general_text
    refused = {
        "--mix": args.mix,
        "--general": general,
        "--against": args.against != "base",
        "--generate": args.generate,
    }
    refused["--task"] = args.task != "sft"
    for flag in (flag for flag, given in refused.items() if given):
        raise ConfigError(
            f"{flag} is for language models, and these adapters have heads for {loaded.task}; leave it out"
        )
    report = score_all(loaded, args.data, pairs_of("--columns", args.columns), args)
    if args.json:
        print(as_json({"base_model": loaded.base.name, "task": loaded.task, "sets": {args.data: report}}))
    else:
        print("\n".join(score_lines(args.data, report)))
    return 0


def _losses(
    runner: Any, rows: list[Example], bank: Any, routes: dict[str, RouteLike], args: argparse.Namespace, task_name: str
) -> dict[str, dict[str, float]]:
    """The metrics of each route on these examples of a task."""
    from veneer.config import TrainOptions
    from veneer.evaluate.losses import compare, example_losses
    from veneer.training.tasks import task_of

    task = task_of(TrainOptions(data=(args.data or "",), task=task_name, beta=args.beta))
    task.longest = args.max_length
    examples = task.sequences(rows)
    results = {}
    for number, (name, route) in enumerate(routes.items()):
        with counting(f"evaluating {name}", len(examples), "examples", (number, len(routes))) as show:
            results[name] = example_losses(runner, examples, bank=bank, route=route, progress=show)
    if task.has_units:
        scores = {name: task.scores(rows, losses, results["base"]) for name, losses in results.items()}
        return {name: {"loss": one.loss, **one.metrics} for name, one in scores.items()}
    found = {}
    for name, losses in results.items():
        found[name] = {"loss": losses.mean, "perplexity": losses.perplexity}
        if name != args.against:
            difference = compare(losses, results[args.against])
            found[name] |= {f"against_{args.against}": difference.mean, "low": difference.low, "high": difference.high}
    return found


@status("reading the examples")
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
        return decode(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"--general-text {file} cannot be read as UTF-8 text: {error}") from None


def _examples(args: argparse.Namespace, base: Base) -> list[Example]:
    from veneer.data.chat.render import Renderer, RenderOptions
    from veneer.data.dataset import load_examples
    from veneer.training.run.setup import context_of

    length = min(context_of(base), args.max_length or context_of(base))
    renderer = Renderer(base.tokenizer, RenderOptions(max_length=length))
    columns = pairs_of("--columns", args.columns)
    examples, report = load_examples([args.data], renderer, format=format_of(args), columns=columns, truncate="end")
    if report.cut:
        print(f"{args.data}: {counted(report.cut, 'example')} truncated to {length:,} tokens", file=sys.stderr)
    return examples[: args.limit]


def _mixes(given: list[str], names: list[str]) -> dict[str, dict[str, float]]:
    mixes: dict[str, dict[str, float]] = {}
    for text in given:
        mix: dict[str, float] = {}
        for part in text.split(","):
            name, colon, weight = part.partition(":")
            if name not in names:
                raise ConfigError(
                    f"--mix {text}: {name!r} is not loaded; loaded adapters: {', '.join(names) or 'none'}"
                )
            try:
                mix[name] = float(weight) if colon else 1.0
                if not math.isfinite(mix[name]):
                    raise ValueError(weight)
            except ValueError:
                raise ConfigError(f"--mix {text}: {weight!r} is not a weight; write NAME:0.5") from None
        mixes[text] = mix
    return mixes


def _lines(label: str, entry: dict[str, Any], against: str) -> list[str]:
    count = entry["examples"]
    lines = [f"{label}: {counted(count, 'example')}, {counted(entry['tokens'], 'token')}"]
    width = max(len(name) for name in entry["routes"])
    for name, row in entry["routes"].items():
        metrics = (
            f"  {key.replace('_', ' ')} {row[key]:.4f}"
            for key in ("reward_accuracy", "reward_margin", "kl")
            if key in row
        )
        line = f"  {name:<{width}}  loss {row['loss']:.4f}" + "".join(metrics)
        line += f"  perplexity {row['perplexity']:.2f}" if "perplexity" in row else ""
        if (change := row.get(f"against_{against}")) is not None:
            if not math.isfinite(row["high"] - row["low"]):
                lines.append(f"{line}  against {against} {change:+.4f} (one example gives no interval)")
                continue
            clear = "better" if row["high"] < 0 else "worse" if row["low"] > 0 else "no clear difference"
            line += f"  against {against} {change:+.4f} (95 %: {row['low']:+.4f} to {row['high']:+.4f}), {clear}"
        lines.append(line)
    return lines
