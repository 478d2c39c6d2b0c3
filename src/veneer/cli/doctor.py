"""``veneer doctor``: check packages, processor, memory, disk and compiler.

Each line is one check with its state: ``ok``, ``note`` (works, but could be better) or ``missing`` (required; the line
says how to fix it). The exit code is 1 if anything is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

from veneer.cli._launch import cores
from veneer.cli._output import as_json
from veneer.cli._parser import add_json


@dataclass(frozen=True)
class Check:
    """One line of the report; ``remedy`` says how to fix it if the state is not ok."""

    name: str
    value: str
    state: str = "ok"
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print all checks; the exit code is 1 if something required is missing."""
    checks = list(examine())
    if args.json:
        print(as_json([asdict(check) for check in checks]))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark = "" if check.state == "ok" else f"  [{check.state}] {check.remedy}"
            print(f"{check.name:<{width}}  {check.value}{mark}")
    return int(any(check.state == "missing" for check in checks))


def examine() -> Iterator[Check]:
    """Yield all checks, the cheap ones first."""
    yield Check("veneer", _version("veneer") or "not installed as a package")
    yield Check("python", f"{platform.python_version()} at {sys.executable}")
    yield Check("system", f"{platform.system()} {platform.release()} on {platform.machine()}")
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


def _packages() -> Iterator[Check]:
    """Compare installed packages with the lower bounds in the package metadata."""
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
            yield Check(name, "not found", "missing", f"pip install '{name}>={lowest}'")
        elif _numbers(found) < _numbers(lowest):
            yield Check(name, found, "missing", f"needs {lowest} or later: pip install '{name}>={lowest}'")
        else:
            yield Check(name, found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _processor() -> Iterator[Check]:
    try:
        import torch

        from veneer.models.precision import fast_dtype
    except ImportError as error:
        yield Check("torch import", f"failed: {error}", "missing", "reinstall torch")
        return
    yield Check("cores", f"{cores()} available; threads of torch: {torch.get_num_threads()}")
    dtype = str(fast_dtype()).removeprefix("torch.")
    yield Check("base weights", f"{dtype} on the CPU" + (" (no fast bfloat16)" if dtype == "float32" else ""))
    yield from _devices()


def _devices() -> Iterator[Check]:
    """Every device besides the CPU, with its memory and the data type that it is fast in."""
    import torch

    from veneer.models.devices import resolve_device
    from veneer.models.precision import fast_dtype

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        device = torch.device("cuda", number)
        free, total = torch.cuda.mem_get_info(device)
        dtype = str(fast_dtype(device)).removeprefix("torch.")
        memory = f"{_gigabytes(free)} of {_gigabytes(total)} free"
        yield Check(str(device), f"{torch.cuda.get_device_name(device)}, {memory}, base weights in {dtype}")
    if torch.backends.mps.is_available():
        yield Check("mps", "Apple's GPU, which shares the machine's memory")
    elif not count:
        built = "" if torch.backends.cuda.is_built() else f" (PyTorch {torch.__version__} is built without CUDA)"
        yield Check("GPU", f"none{built}")
    yield Check("device", f"{resolve_device('auto')} is used unless --device says otherwise")


def _memory() -> Check:
    from veneer.training import process_memory

    free = process_memory.free()
    if free is None:
        return Check("memory free", "unknown on this system")
    if free < 2.5e9:
        return Check("memory free", _gigabytes(free), "note", "training the embedded model needs up to 2.5 GB")
    return Check("memory free", _gigabytes(free))


def _cache() -> Iterator[Check]:
    from veneer.models.cache import cache_root

    root = cache_root()
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    writable = os.access(there, os.W_OK)
    remedy = "set VENEER_HOME to a writable folder"
    yield Check("cache", str(root), *(() if writable else ("missing", remedy)))
    free = shutil.disk_usage(there).free
    remedy = "the embedded model needs 0.6 GB; set VENEER_HOME to a folder with more free space"
    yield Check("disk free", f"{_gigabytes(free)} at {there}", *(() if free > 1e9 else ("note", remedy)))


def _embedded() -> Check:
    from veneer.errors import VeneerError
    from veneer.models.embedded import EMBEDDED, find_embedded

    first, *others = EMBEDDED
    try:
        found = [f"{first} at {find_embedded(first)}"]
    except VeneerError as error:
        return Check("embedded model", "not found", "missing", str(error))
    for alias in others:  # not a dependency
        with contextlib.suppress(VeneerError):
            found.append(f"{alias} at {find_embedded(alias)}")
    return Check("embedded model", ", ".join(found))


def _compiler() -> Check:
    from veneer.kernels import cpp_library as native

    command = native.compiler()
    if command is None:
        remedy = "training on a CPU is slower without one; install g++ or clang++, or set CXX"
        return Check("C++ compiler", "none", "note", remedy)
    where = shutil.which(command[0]) or command[0]
    if native.key() is None:
        remedy = f"{where} --version fails, so training on a CPU is slower; install g++ or clang++, or set CXX"
        return Check("C++ compiler", f"{where}, which does not run", "note", remedy)
    return Check("C++ compiler", where)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
