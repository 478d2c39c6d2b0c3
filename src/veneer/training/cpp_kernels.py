"""C++ kernels during a run on a CPU: built once per processor, which takes seconds, cached, and used if they are faster and correct.

They round differently from PyTorch's functions in the last place, so a run stores which kernels it uses before its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from veneer.errors import VeneerError
from veneer.kernels import cpp_library
from veneer.kernels.lora.native import agrees
from veneer.models.cache import build_once


@contextmanager
def cpp_kernels(option: bool | str, device: torch.device, say: Callable[[str], None]) -> Iterator[None]:
    """Use C++ kernels inside this context, unless the option is False, the device is not a CPU, or they cannot be built."""
    before = cpp_library.folder()
    if option is not False and device.type == "cpu":
        use_cpp_kernels(say)
        if option is True and cpp_library.library() is None:
            say(f"no C++ kernels: {cpp_library.reason()}; using PyTorch's")
    try:
        yield
    finally:
        cpp_library.use(before)


def use_cpp_kernels(say: Callable[[str], None] = lambda line: None) -> None:
    """Use C++ kernels from now on, and build them if needed. If there are none, `cpp_library.reason` returns why."""
    cpp_library.use(*_built(say))
    if cpp_library.library() is None:
        return
    if not cpp_library.supported():
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
