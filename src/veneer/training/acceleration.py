"""Faster kernels during a run: C++ on a CPU, and elementwise chains compiled by torch.

A run uses C++ kernels from its first step. They are built once per processor, which takes seconds, and cached. Where there are none,
torch can compile elementwise chains, which takes some ten seconds in every run, so ``compile: auto`` does it only in a run that is
long enough by its plan.

Both round differently in the last place. So the decision is stored before the first step, and chains are compiled after the first round
of a run, also when it resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from veneer.errors import VeneerError
from veneer.kernels import cpp_library
from veneer.kernels.elementwise.compiled import compile_chains, status
from veneer.kernels.lora.native import agrees
from veneer.models.cache import build_once

_PAYS = 240.0
"""Seconds of a run from which compilation by torch pays: it takes 10 to 15 seconds and saves a twentieth of a step or more."""


def worth_compiling(option: bool | str, seconds: float | None, device: torch.device) -> bool:
    """Decide if torch compiles chains, by the option and the planned ``seconds`` of the run (None without a plan)."""
    if option != "auto":
        return bool(option)
    return seconds is not None and seconds >= _PAYS and cpp_library.library() is None and _has_compiler(device)


@contextmanager
def cpp_kernels(option: bool | str, device: torch.device, say: Callable[[str], None]) -> Iterator[None]:
    """Use C++ kernels inside this context, unless the option is False, the device is no CPU, or they cannot be built."""
    before = cpp_library.folder()
    if option is not False and device.type == "cpu":
        use_native(say)
        if option is True and cpp_library.library() is None:
            say(f"no C++ kernels: {cpp_library.reason()}; using PyTorch's")
    try:
        yield
    finally:
        cpp_library.use(before)


def use_native(say: Callable[[str], None] = lambda line: None) -> None:
    """Use C++ kernels from now on, and build them if needed. If there are none, `cpp_library.reason` returns why."""
    cpp_library.use(*_built(say))
    if cpp_library.library() is None:
        return
    if not cpp_library.pays():
        cpp_library.use(None, why="they are no faster on this processor (they need AVX-512)")
    elif not agrees():
        cpp_library.use(None, why="the build computes other results than PyTorch")
        say(f"no C++ kernels: {cpp_library.reason()}")


def _built(say: Callable[[str], None]) -> tuple[Path | None, str]:
    name = cpp_library.key()
    if name is None:
        return None, "there is no C++ compiler"

    def build(folder: Path) -> None:
        say("building C++ kernels for this processor (once, some seconds)")
        cpp_library.build(folder)

    try:
        return build_once(f"native/{name}", build), ""
    except (RuntimeError, VeneerError) as error:
        say(f"no C++ kernels: {error}")
        return None, str(error)


class DelayedCompilation:
    """Compiles chains inside this context from a run's second round on, if ``wanted``."""

    def __init__(self, wanted: bool, rounds: int, say: Callable[[str], None]) -> None:
        """``rounds`` is the number of rounds that the run has completed."""
        self.wanted = wanted
        self.say = say
        self._rounds = rounds
        self._reported = not wanted

    def __enter__(self) -> DelayedCompilation:
        if self._rounds:
            self._switch_on()
        return self

    def after_round(self) -> None:
        """Switch compilation on after the first round, and report the result after the next one."""
        self._rounds += 1
        if not status().on:
            self._switch_on()
        elif not self._reported:
            self._reported = True
            found = status()
            if found.reason:
                self.say(f"nothing is compiled: {found.reason}; using PyTorch's functions")
            else:
                self.say(f"compiled the base's elementwise chains into {found.graphs} graphs")

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
    except Exception:  # any error of the search means that there is none
        return False
    return True
