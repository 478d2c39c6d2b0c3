"""Faster forms of what a step does besides matrix products, for the length of a run.

From the first step on a run takes the forms of ``adapters/chains`` for norms, gated activations and rotary embeddings, and on a CPU the
kernels in C++ (`kernels/native`), for these and for low-rank products, attention and norms of weights. They are built once for a
processor, which takes seconds, and kept in the cache. Where there is no such kernel, elementwise chains can be compiled by torch, which
takes some ten seconds in every run, and a short one does not earn that back. So ``compile: auto`` asks the plan how long the run will take.

What is decided is written down before the first step, since faster forms round differently in the last place: a run that is
resumed compiles at the same round as the run that was never stopped, the second.

Boundary: whether something can be compiled, and computes the same then, is the matter of ``kernels/``; it goes on plain otherwise, and
that is told here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from veneer.errors import VeneerError
from veneer.kernels import cpp_library as native
from veneer.kernels.elementwise.compiled import compile_chains, status
from veneer.kernels.lora.native import agrees
from veneer.models.cache import build_once

_PAYS = 240.0
"""Seconds of a run from which on compiling pays: it takes 10 to 15 seconds and saves a twentieth of a step or more."""


def worth_compiling(wanted: bool | str, seconds: float | None, device: torch.device) -> bool:
    """Whether torch compiles a run's chains. wanted: the option. seconds: of the whole run, by its plan, None where there is none."""
    if wanted != "auto":
        return bool(wanted)
    return seconds is not None and seconds >= _PAYS and native.library() is None and _has_compiler(device)


@contextmanager
def natively(wanted: bool | str, device: torch.device, say: Callable[[str], None]) -> Iterator[None]:
    """Kernels in C++ inside this context, if the option asks for what is compiled, the base is on a CPU and they can be had.

    say: where it is told that they are built, or why they are not there.
    """
    before = native.folder()
    if wanted is not False and device.type == "cpu":
        use_native(say)
        if wanted is True and native.library() is None:
            say(f"no kernels in C++: {native.reason()}; the plain forms go on")
    try:
        yield
    finally:
        native.use(before)


def use_native(say: Callable[[str], None] = lambda line: None) -> None:
    """Take the kernels in C++ from now on, built where that was not yet done; where they cannot be had, `native.reason` tells why."""
    native.use(*_built(say))
    if native.library() is None:
        return
    if not native.pays():
        native.use(None, why="on this processor they are no faster (they are made for registers of 16 floats, AVX-512)")
    elif not agrees():
        native.use(None, why="what was built computes something else than the plain forms")
        say(f"no kernels in C++: {native.reason()}")


def _built(say: Callable[[str], None]) -> tuple[Path | None, str]:
    name = native.key()
    if name is None:
        return None, "there is no C++ compiler"

    def build(folder: Path) -> None:
        say("building kernels in C++ for this processor, once; it takes some seconds")
        native.build(folder)

    try:
        return build_once(f"native/{name}", build), ""
    except (RuntimeError, VeneerError) as error:
        say(f"no kernels in C++: {error}")
        return None, str(error)


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

    def __exit__(self, *error: object) -> None:
        if self.wanted:
            compile_chains(False)


def _has_compiler(device: torch.device) -> bool:
    if device.type != "cpu":
        return torch.cuda.is_available()
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # whatever the look for it runs into, there is none then
        return False
    return True
