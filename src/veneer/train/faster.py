"""Faster forms of what a step does besides matrix products, for the length of a run.

From the first step on a run takes the forms of ``adapters/chains`` for norms, gated activations and rotary embeddings. Compiled they
are faster still, and on a CPU so are low-rank products in C++ (`kernels/native`). But compiling takes some ten seconds once, which a
short run does not earn back. So ``compile: auto`` asks the plan how long the run will take.

What is decided is written down before the first step, since a compiled chain rounds differently in the last place: a run that is
resumed compiles at the same round as the run that was never stopped, the second.

Boundary: whether something can be compiled, and computes the same then, is the matter of ``kernels/``; it goes on plain otherwise, and
that is told here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from veneer.errors import VeneerError
from veneer.kernels import native
from veneer.kernels.adapted_native import agrees
from veneer.kernels.compiled import compile_chains, status
from veneer.models.cache import build_once

_PAYS = 240.0
"""Seconds of a run from which on compiling pays: it takes 10 to 15 seconds and saves a twentieth of a step or more."""


def worth_compiling(wanted: bool | str, seconds: float | None, device: torch.device) -> bool:
    """Whether a run compiles its chains. wanted: the option. seconds: of the whole run, by its plan, None where there is none."""
    if wanted != "auto":
        return bool(wanted)
    return seconds is not None and seconds >= _PAYS and _has_compiler(device)


class Faster:
    """Compiled chains inside this context, from a run's second round on, if they are wanted.

    rounds: how many the run has behind it. say: where it is told what came of it.
    """

    def __init__(self, wanted: bool, rounds: int, say: Callable[[str], None]) -> None:
        self.wanted = wanted
        self.say = say
        self._rounds = rounds
        self._told = not wanted

    def __enter__(self) -> Faster:
        if self._rounds:
            self._switch_on()
        return self

    def after_round(self) -> None:
        """A round is over. After the first one chains are compiled; after the next it is known what came of it."""
        self._rounds += 1
        if not status().on:
            self._switch_on()
        elif not self._told:
            self._told = True
            found = status()
            went = f"the base's elementwise chains run compiled, in {found.graphs} graphs"
            self.say(f"nothing is compiled: {found.reason}; the plain functions go on" if found.reason else went)

    def _switch_on(self) -> None:
        if self.wanted:
            compile_chains(True)
            use_native()

    def __exit__(self, *error: object) -> None:
        if self.wanted:
            compile_chains(False)
            native.use(None)


def use_native() -> None:
    """Take the kernels in C++ from now on, built where that was not yet done; where they cannot be had, `native.reason` tells why."""
    folder, why = _built()
    native.use(folder, why=why)
    if native.library() is not None and not agrees():
        native.use(None, why="what was built computes something else than the plain forms")


def _built() -> tuple[Path | None, str]:
    name = native.key()
    if name is None:
        return None, "there is no C++ compiler"
    try:
        return build_once(f"native/{name}", native.build), ""
    except (RuntimeError, VeneerError) as error:
        return None, str(error)


def _has_compiler(device: torch.device) -> bool:
    if device.type != "cpu":
        return torch.cuda.is_available()
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # whatever the look for it runs into, there is none then
        return False
    return True
