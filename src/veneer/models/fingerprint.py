"""SHA-256 fingerprints of a base's weights.

    digest = sha256(JSON of [name, dtype, shape] + newline + the bytes in little-endian row order)

A quantized weight counts with its format, the numbers of its blocks and its scales:

    digest = sha256(JSON of [name, format, shape, settings] + newline + the bytes of the packed numbers and of each scale)

The stored tensor counts: a bf16 file has the same fingerprints when it is loaded as fp32. A weight that no file holds under its name and
shape (tied, merged while loading, or a model without files) is hashed in memory. Digests are cached by path, size, time and inode of the
file; an unusable cache costs only time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer._files import replace_text
from veneer.errors import BaseModelError
from veneer.kernels.quantized.bitsandbytes import quantized_layer, quantized_weight
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.models.cache import cache_root
from veneer.models.load import Base
from veneer.models.names import stored_names

_CHUNK = 1 << 23
_HEADER_LIMIT = 100_000_000  # the format's own limit
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of a safetensors file: [start, end) are byte positions in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_fingerprints(
    base: Base | torch.nn.Module,
    names: Iterable[str],
    whole: Callable[[torch.nn.Module], AbstractContextManager[None]] | None = None,
) -> dict[str, str]:
    """The fingerprint of each named weight.

    Args:
        base: a loaded base, or any module (then from memory).
        names: parameter names, such as ``model.layers.0.self_attn.q_proj.weight``.
        whole: makes a context in which a module's weights are whole, where several processes hold parts of them.

    Raises:
        BaseModelError: the model has no such weight, or a file of the base is damaged or gone.
    """
    model = base.model if isinstance(base, Base) else base
    folder = base.path if isinstance(base, Base) else None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = _stored_tensors(folder) if folder is not None else {}
    spelt = stored_names(model, stored) if stored else {}
    known = {file: _read_known(file) for file in {entry.file for entry in stored.values()}}
    grew: set[Path] = set()
    found: dict[str, str] = {}
    for name in names:
        if name not in parameters:
            raise BaseModelError(
                f"{type(model).__name__} has no weight {name!r}, so it has no fingerprint; check the name"
            )
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and quantized_layer(module):
            with contextlib.nullcontext() if whole is None else whole(module):
                found[name] = quantized_fingerprint(name, quantized_weight(module))
            continue
        entry = _find(stored, parameters, spelt, name)
        if entry is None:
            with contextlib.nullcontext() if whole is None else whole(module):
                found[name] = _of_memory(name, module.get_parameter(name.rpartition(".")[2]))
            continue
        if name not in known[entry.file]:
            known[entry.file][name] = _of_file(name, entry)
            grew.add(entry.file)
        found[name] = known[entry.file][name]
    for file in grew:
        _write_known(file, known[file])
    return found


def tensor_fingerprint(name: str, weight: torch.Tensor) -> str:
    """The fingerprint of a tensor in memory under a name: that of a file which stores these numbers under it."""
    return _of_memory(name, weight)


def quantized_fingerprint(name: str, weight: QuantizedWeight) -> str:
    """The fingerprint of a quantized weight, the same in memory and from a file."""
    digest = _start(name, weight.format, tuple(weight.shape), weight.settings)
    for tensor in (weight.stored, *weight.scales.values()):
        _add(digest, tensor)
    return str(digest.hexdigest())


def _find(
    stored: dict[str, _Stored], parameters: dict[str, torch.nn.Parameter], spelt: dict[str, str], name: str
) -> _Stored | None:
    """The file's entry for a weight: its own, as the files spell it, or that of a weight tied to it."""
    parameter = parameters[name]
    tied = [other for other, candidate in parameters.items() if candidate is parameter]
    for candidate in (name, *tied):
        entry = stored.get(spelt.get(candidate, ""))
        if entry is not None and entry.shape == tuple(parameter.shape):
            return entry
    return None


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the folder's weights, by name: those of the index, or of all safetensors files."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        with contextlib.suppress(ValueError, AttributeError, OSError):
            files = sorted({folder / file for file in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    return {name: entry for file in files for name, entry in _header(file)}


def _header(file: Path) -> Iterator[tuple[str, _Stored]]:
    """The tensors of one file: eight bytes with the length of a JSON table, the table, then the bytes that it points to."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError(f"its header claims {length} bytes")
            table: dict[str, Any] = json.loads(stream.read(length))
        table.pop("__metadata__", None)
        for name, entry in table.items():
            start, end = entry["data_offsets"]
            yield name, _Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end)
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"{file} cannot be read as safetensors: {error}; get the file again") from error


def _start(name: str, dtype: str, shape: tuple[int, ...], *more: object) -> Any:
    return hashlib.sha256(json.dumps([name, dtype, list(shape), *more]).encode() + b"\n")


def _of_file(name: str, entry: _Stored) -> str:
    digest, left = _start(name, entry.dtype, entry.shape), entry.end - entry.start
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        while left > 0:
            chunk = stream.read(min(_CHUNK, left))
            if not chunk:
                raise BaseModelError(f"{entry.file} ends before the bytes of {name}; get the file again")
            digest.update(chunk)
            left -= len(chunk)
    return str(digest.hexdigest())


@torch.no_grad()
def _of_memory(name: str, parameter: torch.Tensor) -> str:
    dtype = _NAMES.get(parameter.dtype, str(parameter.dtype).removeprefix("torch."))
    digest = _start(name, dtype, tuple(parameter.shape))
    _add(digest, parameter)
    return str(digest.hexdigest())


def _add(digest: Any, tensor: torch.Tensor) -> None:
    flat = tensor.detach().contiguous().view(-1)
    size = max(1, _CHUNK // max(1, flat.element_size()))
    for chunk in flat.split(size):
        digest.update(chunk.cpu().view(torch.uint8).numpy().data)


def _cache_file(file: Path) -> Path:
    stat = file.stat()
    key = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return cache_root() / "fingerprints" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read_known(file: Path) -> dict[str, str]:
    try:
        known = json.loads(_cache_file(file).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    fits = isinstance(known, dict) and all(isinstance(value, str) and len(value) == 64 for value in known.values())
    return known if fits else {}


def _write_known(file: Path, known: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # a cache only: without it the next call computes again
        merged = {**_read_known(file), **known}
        cached = _cache_file(file)
        cached.parent.mkdir(parents=True, exist_ok=True)
        replace_text(cached, json.dumps(merged, sort_keys=True))
