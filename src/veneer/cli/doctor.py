"""``veneer doctor``: what this machine has for Veneer, and what is missing.

Each line is one fact with its state: ``ok``, ``note`` (works, but something could be better) or ``missing`` (Veneer
needs it; the line says what to do). The exit code is 1 where anything is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Fact:
    """One line: what was looked at, what was found, and what to do where that is not enough."""

    name: str
    value: str
    state: str = "ok"
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Print every fact; 1 if something that Veneer needs is missing."""
    facts = list(examine())
    if args.json:
        print(json.dumps([asdict(fact) for fact in facts], indent=2, ensure_ascii=False))
    else:
        width = max(len(fact.name) for fact in facts)
        for fact in facts:
            mark = "" if fact.state == "ok" else f"  [{fact.state}] {fact.remedy}"
            print(f"{fact.name:<{width}}  {fact.value}{mark}")
    return int(any(fact.state == "missing" for fact in facts))


def examine() -> Iterator[Fact]:
    """All facts, the cheap ones first."""
    yield Fact("veneer", _version("veneer") or "not installed as a package")
    yield Fact("python", f"{platform.python_version()} at {sys.executable}")
    yield Fact("system", f"{platform.system()} {platform.release()} on {platform.machine()}")
    yield from _packages()
    yield from _processor()
    yield _memory()
    yield from _cache()
    yield _embedded()
    yield _compiler()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Fact]:
    """Versions of what the package declares that it needs, against the lower bounds that it declares."""
    try:
        needs = metadata.requires("veneer") or []
    except metadata.PackageNotFoundError:
        needs = ["torch", "transformers", "safetensors", "pydantic", "PyYAML"]
    for need in needs:
        match = re.match(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9.]+))?", need)
        if match is None or "extra ==" in need:
            continue
        name, lowest = match.group(1), match.group(2) or "0"
        found = _version(name)
        if found is None:
            yield Fact(name, "not found", "missing", f"pip install '{name}>={lowest}'")
        elif _numbers(found) < _numbers(lowest):
            yield Fact(name, found, "missing", f"{lowest} or later is needed: pip install '{name}>={lowest}'")
        else:
            yield Fact(name, found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _processor() -> Iterator[Fact]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch

        from veneer.models.precision import fast_dtype
    except ImportError as error:
        yield Fact("torch import", f"fails: {error}", "missing", "install torch again")
        return
    yield Fact("cores", f"{cores} to use, {torch.get_num_threads()} threads in torch")
    dtype = str(fast_dtype()).removeprefix("torch.")
    yield Fact("base weights", f"{dtype} on the processor" + (" (no fast bfloat16)" if dtype == "float32" else ""))
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Fact("GPU", ", ".join(names) or "none")


def _memory() -> Fact:
    free = _free_memory()
    if free is None:
        return Fact("memory free", "unknown on this system")
    if free < 2.5e9:
        return Fact("memory free", _gigabytes(free), "note", "training the embedded model takes up to 2.5 GB")
    return Fact("memory free", _gigabytes(free))


def _free_memory() -> int | None:
    """Bytes that a new process could have, from Linux's own estimate, limited by the control group; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no limit
    return max(free, 0)


def _cache() -> Iterator[Fact]:
    from veneer.models.cache import cache_root

    root = cache_root()
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    writable = os.access(there, os.W_OK)
    remedy = "set VENEER_HOME to a folder that can be written"
    yield Fact("cache", str(root), *(() if writable else ("missing", remedy)))
    free = shutil.disk_usage(there).free
    remedy = "the embedded model takes 0.6 GB there; set VENEER_HOME to a folder with more room"
    yield Fact("disk free", f"{_gigabytes(free)} at {there}", *(() if free > 1e9 else ("note", remedy)))


def _embedded() -> Fact:
    from veneer.errors import VeneerError
    from veneer.models.embedded import EMBEDDED, find_embedded

    try:
        return Fact("embedded model", ", ".join(f"{alias} at {find_embedded(alias)}" for alias in EMBEDDED))
    except VeneerError as error:
        return Fact("embedded model", "not found", "missing", str(error))


def _compiler() -> Fact:
    from veneer.kernels import cpp_library as native

    command = native.compiler()
    if command is None:
        remedy = "training on a processor is slower without one: install g++ or clang++, or name one with CXX"
        return Fact("C++ compiler", "none", "note", remedy)
    return Fact("C++ compiler", shutil.which(command[0]) or command[0])


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
