"""The C++ kernels in ``cpp/``: built once per processor, loaded, and called through ctypes.

Matrix libraries are slow where adapters are small: products with eight columns, attention over a few hundred tokens. Such operations have a
form in C++ beside their plain form in Python, which is the reference and runs where there is no compiler. The sources need a C++17
compiler with OpenMP. They are built for the instructions of this machine, so ``key`` identifies the processor, the compiler and
the sources.

No kernel is built or used until ``use`` is called, since results differ in the last place. The caller chooses the folder. Each kernel's
module declares its functions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "KINDS",
    "build",
    "compiler",
    "folder",
    "function",
    "key",
    "library",
    "processor",
    "reason",
    "supported",
    "use",
]

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes that the kernels accept, with their numbers in C++."""

_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_NAME = "veneer_kernels.so"
_TIMEOUT_SECONDS = 300


class _Loaded:
    folder: Path | None = None
    library: ctypes.CDLL | None = None
    loaded: dict[Path, ctypes.CDLL] = {}
    reason = "not requested"


_state = _Loaded()


def library() -> ctypes.CDLL | None:
    """Return the kernels in use, or None if the plain forms run."""
    return _state.library


def folder() -> Path | None:
    """Return the folder of the kernels in use, or None."""
    return _state.folder if _state.library is not None else None


def reason() -> str:
    """Return the reason why the plain forms run; empty if the kernels are in use."""
    return "" if _state.library is not None else _state.reason


def supported() -> bool:
    """Return True if the kernels in use are faster than the plain forms: they need registers of 16 floats (AVX-512)."""
    return _state.library is not None and bool(_state.library.veneer_pays())


def use(folder: Path | None, why: str = "not requested") -> None:
    """Use the kernels in ``folder`` from now on in the whole process; None selects the plain forms, for the reason ``why``."""
    _state.folder, _state.library, _state.reason = folder, None, why
    if folder is None:
        return
    try:
        if folder not in _state.loaded:
            _state.loaded[folder] = ctypes.CDLL(str(folder / _NAME))
        _state.library = _state.loaded[folder]
    except OSError as error:
        _state.reason = f"the built library cannot be loaded: {error}"


@lru_cache
def function(made: ctypes.CDLL, name: str, arguments: tuple[Any, ...], result: Any = None) -> Callable[..., Any]:
    """Return a library function that takes plain Python numbers of these C types, so that a call costs little."""
    call = made[name]
    call.argtypes, call.restype = arguments, result
    return call


def compiler() -> list[str] | None:
    """Return the C++ compiler's command: ``$CXX``, or c++, g++ or clang++ on the path; None if there is none."""
    if named := os.environ.get("CXX"):
        words = shlex.split(named)
        return words if words and shutil.which(words[0]) else None
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return None if found is None else [found]


def key() -> str | None:
    """Return the name of the library that ``build`` makes here, or None without a compiler."""
    command = compiler()
    if command is None:
        return None
    try:
        version = subprocess.run(
            [*command, "--version"], capture_output=True, timeout=_TIMEOUT_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    parts = [version, processor().encode(), " ".join([*command, *_FLAGS]).encode()]
    parts += [path.read_bytes() for path in sorted(_SOURCES.iterdir())]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def build(folder: Path) -> None:
    """Compile the sources into ``folder``.

    Raises:
        RuntimeError: with the compiler's first error.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("there is no C++ compiler (none of $CXX, c++, g++, clang++)")
    sources = [str(path) for path in sorted(_SOURCES.glob("*.cpp"))]
    words = [*command, *_FLAGS, *sources, "-o", str(folder / _NAME)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{command[0]} failed: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise RuntimeError(f"{command[0]} failed: {lines[0] if lines else f'exit code {done.returncode}'}")


def processor() -> str:
    """Return the model and the instruction sets of this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    keys = ("model name", "flags", "Features", "cpu family", "model\t")
    return "\n".join(dict.fromkeys([platform.machine(), *(line for line in lines if line.startswith(keys))]))
