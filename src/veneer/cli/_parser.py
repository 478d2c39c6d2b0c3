"""argparse, with errors of our own tree and a suggestion for a flag that is nearly right."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from veneer.config import near_miss
from veneer.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Takes flags in full only, and raises ConfigError where argparse would print usage and leave."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help says more")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse everything, flags and other words in any order, or raise ConfigError that names what is not known."""
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-") and len(word) > 1]
        if flags:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            raise ConfigError("; ".join(f"there is no flag {flag}{near_miss(flag, known)}" for flag in flags))
        if unknown:
            self.error(f"{unknown[0]!r} is one word too many")
        return parsed
