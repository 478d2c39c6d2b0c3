"""``veneer COMMAND ...``: find the command, read its arguments, run it, and end with one line and an exit code.

    0   done                              130   stopped with Ctrl-C
    1   it could not be done              141   the reader of our output went away
    2   the command was wrong

Nothing here imports torch, and a command's file is imported only when it is the one that was asked for.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from veneer._version import __version__
from veneer.cli._failure import explain
from veneer.cli._parser import Parser
from veneer.config import near_miss
from veneer.errors import ConfigError

COMMANDS = {
    "demo": "the whole story on the embedded model, in a few minutes",
    "train": "train an adapter; the same command again resumes",
    "plan": "memory and time of a run, before it costs them",
    "chat": "talk to a run, an adapter or a base",
    "generate": "answer prompts from a file or the command line",
    "evaluate": "judge an adapter against its base on held-out examples",
    "merge": "write the base with an adapter in it, and say how exact it is",
    "compose": "make one adapter from several",
    "extract": "make an adapter from the difference of two sets of weights",
    "inspect": "show what an adapter's folder holds, and verify it",
    "import": "make a PEFT folder of an adapter of mlx-lm or LitGPT",
    "export": "write an adapter for another program",
    "data check": "look through a file of examples for what would go wrong",
    "data show": "show examples with the trained tokens marked",
    "runs": "list the runs in a folder",
    "config schema": "print the JSON Schema of the options, for editors",
    "doctor": "say what this machine has, and what is missing",
}
"""Every command and what it does; one is offered when its file is there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and raises nothing."""
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare()
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse, after printing help
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        _close_output()
        return 141
    except KeyboardInterrupt:
        _say("veneer: stopped")
        return 130
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        message, code = explain(error)
        _say(f"veneer: error: {message}")
        return code


def available() -> dict[str, str]:
    """The commands whose file is there, in the order of the list, with what they do."""
    return {name: text for name, text in COMMANDS.items() if (Path(__file__).parent / f"{_stem(name)}.py").is_file()}


def parser_of(name: str, load: Callable[[str], ModuleType] = importlib.import_module) -> tuple[Parser, ModuleType]:
    """The parser of one command and the module that runs it."""
    module = load(f"veneer.cli.{_stem(name)}")
    parser = Parser(prog=f"veneer {name}", description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.")
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser, module


def _dispatch(words: list[str]) -> int:
    first = next((word for word in words if word != "--debug"), "--help")
    if first in ("-h", "--help", "help"):
        print(_overview(available()))
        return 0
    if first == "--version":
        print(f"veneer {__version__}")
        return 0
    rest = words[words.index(first) + 1 :]
    name = first
    group = {command: text for command, text in available().items() if command.startswith(f"{first} ")}
    if group:
        if not rest or rest[0] in ("-h", "--help"):
            print(_overview(group))
            return 0 if rest else 2
        name = f"{first} {rest.pop(0)}"
    _check_known(name, first, group)
    parser, module = parser_of(name)
    return int(module.run(parser.parse_args(rest)))


def _check_known(name: str, first: str, group: dict[str, str]) -> None:
    known = available()
    if name in known:
        return
    if first.startswith("-"):
        raise ConfigError(f"{first} stands before the command; write: veneer COMMAND {first} ...")
    hint = near_miss(name, group or known) or near_miss(name, [command.split()[0] for command in known])
    raise ConfigError(f"there is no command {name!r}{hint or '; veneer --help lists them'}")


def _overview(commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    lines = [
        "usage: veneer COMMAND ...",
        "",
        "Train, mix, merge and measure LoRA and DoRA adapters on a frozen base.",
        "",
    ]
    lines += [f"  {name:<{width}}  {text}" for name, text in commands.items()]
    return "\n".join([*lines, "", "veneer COMMAND --help says more. Every command takes --debug."])


def _stem(name: str) -> str:
    return name.replace(" ", "_")


def _prepare() -> None:
    """No telemetry from what we import, a quick start, no hoard of kernels, no crash over a letter that the terminal cannot show."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # Batches of every length leave a prepared kernel each, a megabyte or two; the library and torch's bridge to it each keep 1,024 of
    # them unless told otherwise.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
    # Python's collector of cycles would look through all that imports leave, again and again: a second of every start.
    gc.set_threshold(50_000, *gc.get_threshold()[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _close_output() -> None:
    """Send what is still buffered nowhere, so that Python's own flush at exit does not complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
