"""``veneer generate TARGET PROMPT...``: answer prompts, one after another, side by side where several are pointed at."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._target import add_target_arguments, load_targets
from veneer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from veneer.evaluate.generation import Generator, Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_target_arguments(parser)
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to answer; - reads the standard input")
    parser.add_argument("--file", metavar="FILE", help="prompts from a file, one a line")
    parser.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    parser.add_argument("--compare", action="store_true", help="let the base answer too")
    add_sampling_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, on a line of its own")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen."""
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="most tokens of an answer (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default: 0)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens of this mass"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="where sampling starts from (default: 0)")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise ConfigError for values that no sampling can use."""
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens: expected at least 1, found {args.max_tokens}")
    if not 0 <= args.temperature <= 100:
        raise ConfigError(f"--temperature: expected 0 to 100, found {args.temperature:g}")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p: expected more than 0 and at most 1, found {args.top_p:g}")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_sampling(args)
    prompts = _prompts(args)
    from veneer.evaluate.generation import Generator, Sampling

    loaded = load_targets(args.target, args.base, args.dtype, force=args.force)
    generator = Generator(loaded.base.model, loaded.base.tokenizer, loaded.bank)
    sampling = Sampling(args.max_tokens, args.temperature, args.top_p, args.seed)
    routes: list[str | None] = [*loaded.names] or [None]
    if args.compare and loaded.names:
        routes.insert(0, None)
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
        asked = messages if generator.chats or args.system is not None else prompt
        answers = {}
        for route in routes:
            answers[route or "base"] = _answer(generator, asked, route, sampling, args.json, len(routes) > 1)
        if args.json:
            print(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False), flush=True)
    return 0


def _answer(generator: Generator, asked: Any, route: str | None, sampling: Sampling, quiet: bool, several: bool) -> str:
    if several and not quiet:
        print(f"[{route or 'base'}]", flush=True)
    pieces = []
    for piece in generator.stream(asked, route, sampling):
        pieces.append(piece)
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print()
    return "".join(pieces)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    if args.file is not None:
        try:
            lines = Path(args.file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{args.file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        prompts += [line for line in lines if line.strip()]
    if not any(prompt.strip() for prompt in prompts):
        raise ConfigError('no prompt is given: write veneer generate TARGET "PROMPT", or --file FILE with one a line')
    return prompts
