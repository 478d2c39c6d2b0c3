"""``veneer generate TARGET PROMPT...``: generate answers to prompts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._files import decode
from veneer.cli._parser import add_json, at_least, number
from veneer.cli._targets import add_target_arguments, load_targets
from veneer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from veneer.serve.engine.request import SamplingParams
    from veneer.serve.generation import TextGenerator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_target_arguments(parser)
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="prompt to answer; - reads standard input")
    parser.add_argument("--file", metavar="FILE", help="file of prompts, one per line")
    parser.add_argument("--system", metavar="TEXT", help="system message before each prompt")
    parser.add_argument("--compare", action="store_true", help="also print the answers of the base")
    add_sampling_arguments(parser)
    add_json(parser, "print one JSON object per prompt, each on one line")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that control sampling."""
    parser.add_argument(
        "--max-tokens", type=at_least(1), default=256, metavar="N", help="maximum tokens per answer (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=number("0 to 100", lambda value: 0 <= value <= 100),
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 decodes greedily (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=number("more than 0 and at most 1", lambda value: 0 < value <= 1),
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens with this total probability (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed for sampling (default: 0)")


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """Return the sampling settings that the arguments ask for."""
    from veneer.serve.engine.request import SamplingParams

    return SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)


def run(args: argparse.Namespace) -> int:
    """Print the answers, one prompt after another."""
    prompts = _prompts(args)
    from veneer.serve.generation import text_generator

    loaded = load_targets(args)
    generator = text_generator(loaded.base, loaded.bank)
    sampling = sampling_of(args)
    routes: list[str | None] = [*loaded.names] or [None]
    if args.compare and loaded.names:
        routes.insert(0, None)
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
        given = messages if generator.chats or args.system is not None else prompt
        answers = {}
        for route in routes:
            if len(routes) > 1 and not args.json:
                print(f"[{route or 'base'}]", flush=True)
            answers[route or "base"] = _answer(generator, given, route, sampling, quiet=args.json)
        if args.json:
            print(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False), flush=True)
    return 0


def _answer(generator: TextGenerator, prompt: Any, route: str | None, sampling: SamplingParams, *, quiet: bool) -> str:
    pieces = []
    for piece in generator.stream(prompt, route, sampling):
        pieces.append(piece)
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print()
    return "".join(pieces)


_ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Endings of files whose lines are rows and no prompts."""


def _prompts(args: argparse.Namespace) -> list[str]:
    for path in [*args.prompt, *([] if args.file is None else [args.file])]:
        if Path(path).suffix in _ROWS and Path(path).is_file():
            raise ConfigError(
                f"{path}: expected a text file with one prompt per line, found one of rows; write their prompts into such a file"
            )
    for prompt in args.prompt:
        if Path(prompt).suffix in (".txt", ".md") and Path(prompt).is_file():
            raise ConfigError(f"{prompt} is a file; read one prompt per line with --file {prompt}")
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    if args.file is not None:
        try:
            lines = decode(Path(args.file).read_bytes()).splitlines()
        except ValueError as error:
            raise DataError(f"{args.file}: {error}") from None
        prompts += [line for line in lines if line.strip()]
    if not any(prompt.strip() for prompt in prompts):
        raise ConfigError('no prompt given; write veneer generate TARGET "PROMPT", or --file FILE with one per line')
    return prompts
