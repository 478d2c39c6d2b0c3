"""An argparse parser that raises Veneer's errors, and the arguments that several commands share."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from veneer.checkpoints.locate import QUANTIZED
from veneer.config import near_miss, similar
from veneer.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16")


class Parser(argparse.ArgumentParser):
    """Accepts options in full only, in any order with other arguments, and raises ConfigError instead of exiting."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def shorten_usage(self) -> None:
        """Show arguments and required options in the usage line, and ``[OPTIONS]`` for the others."""
        shown = [action for action in self._actions if action.required or not action.option_strings]
        formatter = self._get_formatter()
        formatter.add_usage(None, shown, [], prefix="")
        rest = " ".join(formatter.format_help().split()).removeprefix(self.prog).replace("%", "%%")
        self.usage = f"%(prog)s [OPTIONS]{rest}"

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError for a value that is not one of the choices, with the closest one."""
        choices = [*map(str, action.choices or ())]
        if choices and value not in choices:
            expected = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
            raise argparse.ArgumentError(action, f"expected {expected}, found {value!r}{similar(str(value), choices)}")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse all arguments.

        Raises:
            ConfigError: An argument is unknown, missing or invalid; the message suggests the closest known option.
        """
        words = [*(sys.argv[1:] if args is None else args)]
        # Unknown options are reported before argparse can miss an argument that was given as an option.
        self._refuse(word for word in takewhile(lambda word: word != "--", words) if word.startswith("--"))
        parsed, unknown = self.parse_known_intermixed_args(words, namespace)
        self._refuse(word for word in unknown if word.startswith("-") and len(word) > 1)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return parsed

    def long_options(self) -> list[str]:
        """The options that start with two dashes."""
        return [option for option in self._option_string_actions if option.startswith("--")]

    def _refuse(self, words: Iterable[str]) -> None:
        """Raise ConfigError for options that do not exist, with the name here of those that other programs have."""
        options = [word.partition("=")[0] for word in words]
        unknown = [option for option in options if option not in self._option_string_actions and " " not in option]
        known = self.long_options()
        lines = [f"unknown option {option}{near_miss(option, known)}" for option in dict.fromkeys(unknown)]
        if len(lines) > 1:
            lines = [
                f"{len(lines)} unknown options",
                *(f"  - {line.removeprefix('unknown option ')}" for line in lines),
            ]
        if lines:
            raise ConfigError("\n".join(lines))


def at_least(minimum: int, most: float = math.inf) -> Callable[[str], int]:
    """Return an argparse type for integers from ``minimum`` to ``most``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, found {text!r}") from None
        if not minimum <= value <= most:
            expected = f"at least {minimum}" if most == math.inf else f"{minimum} to {most}"
            raise argparse.ArgumentTypeError(f"expected {expected}, found {value}")
        return value

    return parse


def number(expected: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    """Return an argparse type for finite numbers that ``accepts`` approves; ``expected`` describes them in errors."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and accepts(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text}")
        return value

    return parse


def add_json(parser: argparse.ArgumentParser, what: str = "print the report as JSON") -> None:
    """Declare ``--json``."""
    parser.add_argument("--json", action="store_true", help=what)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declare ``--dtype`` for the base in memory."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of the base weights in memory (default: auto)"
    )


def add_device(parser: argparse.ArgumentParser, what: str = "device of the base") -> None:
    """Declare ``--device``."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help=f"{what}: cpu, cuda, cuda:N, mps, or auto, a GPU where there is one (default: auto)",
    )


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Declare ``--quantize`` for the base in memory."""
    parser.add_argument(
        "--quantize",
        choices=("auto", "none", *QUANTIZED),
        default="auto",
        help="quantize the base while it is read (default: auto, as the adapters' base was in training)",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Declare ``--force``."""
    parser.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="CHECK",
        help="let an adapter pass a check that refuses it, with a note: base, receipt, config, scale or embeddings; repeat for several",
    )


def add_sites(parser: argparse.ArgumentParser, which: str) -> None:
    """Declare ``--sites N``, the length of the table of sites."""
    parser.add_argument(
        "--sites", type=at_least(0), default=5, metavar="N", help=f"show the {which} N sites (default: 5)"
    )
