"""Kernels in C++ for the processor at hand: built once, kept in a folder, called without a detour.

Matrix libraries are at their worst where adapters live: products with eight columns, attention of a few hundred tokens. What gains by it
has a form in C++ in ``cpp/``, beside its plain form in Python, which stays the reference and goes on wherever there is no compiler. The
sources need a C++17 compiler with OpenMP and nothing else; they take the instructions of the machine that they are built on, so that
the folder's name tells the processor, the compiler and the sources (`key`).

Nothing is built or used until a run asks for it, `use`, since results differ in the last place. What is loaded is told by `library`.

Boundary: where the folder lies is decided above this room; it is handed in. Each kernel's own module declares its functions.
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

__all__ = ["KINDS", "build", "compiler", "folder", "function", "key", "library", "pays", "reason", "use"]

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes that kernels in C++ take, and their numbers there."""

_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_NAME = "veneer_kernels.so"
_SECONDS = 300


class _State:
    folder: Path | None = None
    library: ctypes.CDLL | None = None
    loaded: dict[Path, ctypes.CDLL] = {}
    reason = "not asked for"


_state = _State()


def library() -> ctypes.CDLL | None:
    """The kernels in C++, or None where the plain forms are to run."""
    return _state.library


def folder() -> Path | None:
    """Where the kernels that are in use lie, or None."""
    return _state.folder if _state.library is not None else None


def reason() -> str:
    """Why the plain forms run; empty if they do not."""
    return "" if _state.library is not None else _state.reason


def pays() -> bool:
    """Whether the kernels in use are faster than the plain forms on this processor: with smaller registers they are not."""
    return _state.library is not None and bool(_state.library.veneer_pays())


def use(folder: Path | None, why: str = "not asked for") -> None:
    """Take the kernels that `build` put into ``folder`` from now on, in the whole process; None: the plain forms, and ``why``."""
    _state.folder, _state.library, _state.reason = folder, None, why
    if folder is None:
        return
    try:
        if folder not in _state.loaded:
            _state.loaded[folder] = ctypes.CDLL(str(folder / _NAME))
        _state.library = _state.loaded[folder]
    except OSError as error:
        _state.reason = f"what was built cannot be loaded: {error}"


@lru_cache
def function(made: ctypes.CDLL, name: str, arguments: tuple[Any, ...], result: Any = None) -> Callable[..., Any]:
    """A function of a library that takes plain numbers of these C types: kernels of a few microseconds are called by it."""
    found = made[name]
    found.argtypes, found.restype = arguments, result
    return found


def compiler() -> list[str] | None:
    """The C++ compiler's command: ``$CXX``, or c++, g++ or clang++ on the path; None if there is none."""
    if named := os.environ.get("CXX"):
        words = shlex.split(named)
        return words if words and shutil.which(words[0]) else None
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return None if found is None else [found]


def key() -> str | None:
    """A name for what `build` would make here, or None without a compiler."""
    command = compiler()
    if command is None:
        return None
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    parts = [version, _processor().encode(), " ".join([*command, *_FLAGS]).encode()]
    parts += [path.read_bytes() for path in sorted(_SOURCES.iterdir())]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def build(folder: Path) -> None:
    """Compile the sources into ``folder``. Raises RuntimeError with the compiler's first complaint."""
    command = compiler()
    if command is None:
        raise RuntimeError("there is no C++ compiler (none of $CXX, c++, g++, clang++)")
    sources = [str(path) for path in sorted(_SOURCES.glob("*.cpp"))]
    words = [*command, *_FLAGS, *sources, "-o", str(folder / _NAME)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{command[0]} failed: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise RuntimeError(f"{command[0]} failed: {lines[0] if lines else f'exit code {done.returncode}'}")


def _processor() -> str:
    """What tells one processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    told = ("model name", "flags", "Features", "cpu family", "model\t")
    return "\n".join(dict.fromkeys([platform.machine(), *(line for line in lines if line.startswith(told))]))
