"""``veneer COMMAND ...``: find the command, parse its arguments and run it.

Exit codes:

    0   success                           130   interrupted with Ctrl-C
    1   the command failed                141   the reader of the output closed the pipe
    2   the command line was wrong

Nothing here imports torch, and only the file of the requested command is imported.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from veneer._terminal import wrapped
from veneer._version import __version__
from veneer.cli._error_text import explain
from veneer.cli._parser import Parser
from veneer.config import command_hint
from veneer.errors import ConfigError

COMMANDS = {
    "demo": "train an adapter on the embedded model and show the result, in a few minutes",
    "init": "ask four questions and write a file of training options",
    "train": "train adapters; rerun the same command to resume",
    "plan": "estimate the memory and time of a training run",
    "chat": "chat with an adapter or a base in the terminal",
    "generate": "generate answers to prompts",
    "evaluate": "compare the held-out loss of adapters with that of their base, or score their heads",
    "predict": "predict the labels of a file of rows",
    "compare": "compare methods and options on your data, with searched learning rates and several seeds",
    "merge": "merge adapters into the base weights and write the model",
    "quantize": "write a base with its weights quantized to nf4, fp4 or int8",
    "compose": "combine several adapters into one",
    "extract": "extract an adapter from the difference between two models",
    "inspect": "show and verify the contents of an adapter",
    "import": "convert an adapter of mlx-lm or LitGPT to a PEFT folder",
    "export": "convert an adapter for another program, or write its model card",
    "push": "upload an adapter to the Hugging Face Hub",
    "data check": "check a file of examples for problems",
    "data show": "show examples with the trained tokens marked",
    "serve": "serve a base with its adapters over the OpenAI API, and train more of them",
    "runs": "list training runs; pause, resume or cancel their jobs",
    "config schema": "print the JSON Schema of the training options",
    "models": "list the base models on this machine",
    "completion": "print a script that completes commands and options in your shell",
    "doctor": "check this machine for everything that Veneer needs",
}
"""Every command with its description."""

EXAMPLES = {
    "train": (
        "rows.jsonl --base smollm2-135m --out runs/first",
        "rows.csv --columns prompt=question,completion=answer --out runs/csv",
        "rows.jsonl --valid-fraction 0.1 --r 8 --learning-rate 2e-4 --epochs 3 --out runs/second",
        "run.yaml --steps 200",
    ),
    "compare": ("rows.jsonl --valid valid.jsonl --test test.jsonl --r 4,16 --out runs/ranks",),
    "generate": (
        'runs/first "2 + 2?"',
        "runs/first --file prompts.txt --json",
    ),
    "evaluate": ("runs/first --data heldout.jsonl --general",),
    "merge": ("runs/first --out merged", "runs/a:0.7 runs/b:0.3 --out merged"),
    "compose": ("runs/a:0.7 runs/b:0.3 --out both",),
    "export": (
        "runs/first --to gguf --out first.gguf",
        "runs/first --to gguf --merged --quantize q8_0 --out merged.gguf",
    ),
    "plan": ("--base MODEL --memory 24GB", "rows.jsonl --base smollm2-135m --out runs/first"),
    "serve": ("--base smollm2-135m --adapters runs",),
    "runs": ("", "runs/both --pause sql"),
}
"""Commands -> arguments of the examples that their help ends with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are printed, not raised."""
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare()
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse, after printing help
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        _discard_output()
        return 141
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # a terminal interrupts all processes of a run
            _print_error("veneer: interrupted")
        return 130
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        message, code = explain(error)
        _print_error(f"veneer: error: {message}")
        return code


def parser_of(name: str) -> tuple[Parser, ModuleType]:
    """Return the parser of one command and the module that runs it."""
    module = importlib.import_module(f"veneer.cli.{name.replace(' ', '_')}")
    parser = Parser(prog=f"veneer {name}", description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.")
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    parser.shorten_usage()
    if examples := EXAMPLES.get(name):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the examples' lines
        parser.epilog = "\n".join(["examples:", *(f"  veneer {name} {words}" for words in examples)])
    return parser, module


def _dispatch(words: list[str]) -> int:
    first = next((word for word in words if word != "--debug"), "--help")
    rest = words[words.index(first) + 1 :] if first in words else []
    if first == "help" and rest:  # veneer help train = veneer train --help
        return _dispatch([*rest, "--help"])
    if first in ("-h", "--help", "help"):
        print(_overview(COMMANDS))
        return 0
    if first == "--version":
        print(f"veneer {__version__}")
        return 0
    name = first
    group = {command: text for command, text in COMMANDS.items() if command.startswith(f"{first} ")}
    if group:
        if not rest or rest[0] in ("-h", "--help"):
            print(_overview(group))
            return 0 if rest else 2
        name = f"{first} {rest.pop(0)}"
    if name not in COMMANDS:
        raise _unknown(name, first, group)
    parser, module = parser_of(name)
    args = parser.parse_args(rest)
    args.words = rest
    return int(module.run(args))


def _unknown(name: str, first: str, group: dict[str, str]) -> ConfigError:
    if first.startswith("-"):
        return ConfigError(f"the option {first} comes before the command; write: veneer COMMAND {first} ...")
    groups = [command.split()[0] for command in COMMANDS if " " in command]
    hint = (
        (command_hint(name.split()[-1], group) or command_hint(name, group))
        if group
        else command_hint(name, [*COMMANDS, *groups])
    )
    return ConfigError(f"unknown command {name!r}{hint or '; veneer --help lists the commands'}")


def _overview(commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    return "\n".join(
        [
            "usage: veneer COMMAND ...",
            "",
            "Train, combine, merge and evaluate LoRA and DoRA adapters on a frozen base model.",
            "",
            *(f"  {name:<{width}}  {text}" for name, text in commands.items()),
            "",
            "veneer COMMAND --help shows the options of a command. All commands accept --debug.",
        ]
    )


def _prepare() -> None:
    """Set up the process: no telemetry, bounded kernel caches, fewer garbage collections, output in any locale."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # oneDNN prepares a kernel of a megabyte or two for every batch length. oneDNN and torch's bridge to it each cache
    # 1,024 of them by default.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
    # Imports create many long-lived objects; scanning them again and again costs a second at every start, and another at exit.
    gc.set_threshold(50_000, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(wrapped(line, sys.stderr), file=sys.stderr, flush=True)


def _discard_output() -> None:
    """Discard buffered output, so that Python's flush at exit does not fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
