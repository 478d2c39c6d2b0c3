"""Safetensors files: read with every claim of the header checked before a byte of data, and written deterministically.

    8 bytes            n, the header's length, little-endian
    n bytes            JSON: {"__metadata__": {name: text}, tensor name: {"dtype", "shape", "data_offsets": [begin, end]}}
    the rest           the tensors' bytes, without a hole or an overlap

The format is the library's; this reader accepts less on purpose. A legal file can hold a million empty tensors, shapes of a hundred
thousand dimensions or two tensors of one name; none of these is an adapter. Limits: a header of 4 MiB, 20,000 tensors, 4
dimensions, at least one number in each tensor, dtypes F32, F16 and BF16.

Boundary: names and shapes are compared with the bytes of the file only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from veneer.checkpoints.files import parse_json, read_exactly
from veneer.checkpoints.findings import shown
from veneer.errors import CheckpointError, Problems

MAX_HEADER = 4 << 20
MAX_TENSORS = 20_000
EXPERTS = 8
"""Factor of both limits for a file whose tensors are mostly those of experts: a layer of a mixture has hundreds of them."""
MAX_DIMS = 4
MAX_BYTES = 16 << 30

# Most that a header of MAX_TENSORS tensors with a receipt may hold of each. Parsed JSON takes many times the memory of its text;
# counting its parts first costs nothing.
_MARKS = {b"{": 4 * MAX_TENSORS, b"[": 4 * MAX_TENSORS, b'"': 24 * MAX_TENSORS, b",": 32 * MAX_TENSORS}

DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """The header's entry of one tensor. ``begin`` and ``end`` count from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The checked header: entries in the order of their data, the metadata, and where the data begins."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    start: int


def read_header(file: BinaryIO, size: int, where: str) -> Header:
    """Read and check the header of an open file of ``size`` bytes; nothing else is read.

    Raises CheckpointError with everything that is wrong with it.
    """
    first = file.read(8)
    if size < 8 or len(first) < 8:
        raise CheckpointError(
            f"{where} is not a safetensors file: it has {size} bytes, fewer than the 8 that it begins with"
        )
    _refuse_other_formats(first, where)
    length = int.from_bytes(first, "little")
    too_long = CheckpointError(f"{where}: its header claims {length:,} bytes; at most {MAX_HEADER:,} are read")
    if length > MAX_HEADER * EXPERTS:
        raise too_long
    if length > size - 8:
        raise CheckpointError(f"{where} is cut off: its header claims {length:,} bytes, the file has {size - 8:,} left")
    raw = read_exactly(file, length, where)
    count = raw.count(b'"data_offsets"')
    factor = EXPERTS if 2 * raw.count(b".experts.") > count else 1
    if length > MAX_HEADER * factor:
        raise too_long
    if count > MAX_TENSORS * factor or any(raw.count(mark) > most * factor for mark, most in _MARKS.items()):
        raise CheckpointError(f"{where} names more than {MAX_TENSORS * factor:,} tensors, or its header is too complex")
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where} is not a safetensors file: its header does not begin with a brace")
    parsed = parse_json(raw, f"the header of {where}")
    problems = Problems()
    metadata = _metadata(parsed.pop("__metadata__", {}), problems)
    entries = [entry for name, value in parsed.items() if (entry := _entry(name, value, problems)) is not None]
    if not problems:
        _check_layout(entries, size - 8 - length, problems)
    problems.raise_if_any(CheckpointError, f"{where} cannot be read")
    return Header(tuple(sorted(entries, key=lambda entry: entry.begin)), metadata, 8 + length)


def read_tensors(file: BinaryIO, header: Header, where: str) -> tuple[dict[str, Tensor], str]:
    """Every tensor, in private memory and its stored dtype, and the `digest` of them all.

    Raises CheckpointError when the file ends early.
    """
    tensors: dict[str, Tensor] = {}
    file.seek(header.start)
    for entry in header.entries:
        data = read_exactly(file, entry.end - entry.begin, where)
        tensors[entry.name] = torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)
    return tensors, digest(tensors)


def to_buffers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """The content of a file, piece by piece and without a copy. The same tensors and metadata give the same bytes, in every process."""
    header: dict[str, object] = {"__metadata__": {name: metadata[name] for name in sorted(metadata)}}
    offset = 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        dtype, shape = NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *(_raw(tensors[name]) for name in sorted(tensors))]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """The library's own writer, for large files of a run or a model.

    Raises OSError with the file's name if it cannot be written: the library raises one error for a full disk and for a broken file.
    """
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
        path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes files that nobody else may read
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number.group(1)) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def dtype_name(dtype: torch.dtype) -> str:
    """The name without the module's: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}\x1f{NAMES[tensor.dtype]}\x1f{tuple(tensor.shape)}\x1f".encode())
        total.update(_raw(tensor))
    return total.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is on the CPU and contiguous."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _refuse_other_formats(first: bytes, where: str) -> None:
    begin = first.lower()
    if begin == b"version ":
        raise CheckpointError(f"{where} is a Git LFS pointer, not the file itself; fetch it: git lfs pull")
    if begin in (b"<!doctyp", b"<html><h") or begin.startswith(b"<html"):
        raise CheckpointError(f"{where} is a web page, perhaps an error instead of a download; download the file again")
    kinds = {b"PK\x03\x04": "a zip archive, as torch.save writes it", b"GGUF": "a GGUF file"}
    kinds |= {bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)}
    kind = next((text for magic, text in kinds.items() if first.startswith(magic)), None)
    # A header of 0x0280 bytes begins like a pickle; but the bytes after a pickle's mark make a length that is never read.
    if kind is not None and int.from_bytes(first, "little") > MAX_HEADER * EXPERTS:
        raise CheckpointError(f"{where} is {kind}, in spite of its name; expected a safetensors file")


def _metadata(value: object, problems: Problems) -> dict[str, str]:
    if value is None:  # as mlx writes a file without any
        return {}
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return dict(value)
    problems.add("its metadata is not a table of texts")
    return {}


def _entry(name: str, value: object, problems: Problems) -> Entry | None:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        problems.add(f"tensor {shown(name)}: expected dtype, shape and data_offsets")
        return None
    shape, offsets, dtype = value["shape"], value["data_offsets"], value["dtype"]
    if not _counts(shape) or not 0 < len(shape) <= MAX_DIMS or 0 in shape:
        problems.add(f"tensor {shown(name)}: expected 1 to {MAX_DIMS} sizes of at least 1, found {shown(shape, 60)}")
        return None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        problems.add(f"tensor {shown(name)}: expected dtype {', '.join(DTYPES)}, found {shown(dtype, 20)}")
        return None
    if not _counts(offsets) or len(offsets) != 2:
        problems.add(f"tensor {shown(name)}: expected two offsets, found {shown(offsets, 60)}")
        return None
    entry = Entry(name, DTYPES[dtype], tuple(shape), offsets[0], offsets[1])
    if entry.end - entry.begin != entry.numel * entry.dtype.itemsize:
        problems.add(
            f"tensor {shown(name)}: {dtype} of shape {shape} does not fill the bytes {offsets[0]:,} to {offsets[1]:,}"
        )
        return None
    return entry


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _check_layout(entries: Iterable[Entry], available: int, problems: Problems) -> None:
    """The tensors' bytes follow each other without a hole or an overlap and end where the file ends."""
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "leaves a hole before it"
            problems.add(
                f"tensor {shown(entry.name)} {what}: it begins at byte {entry.begin:,} of the data, expected {position:,}"
            )
            return
        position = entry.end
    if position != available:
        problems.add(f"its tensors fill {position:,} bytes of data, the file has {available:,}")
    elif position > MAX_BYTES:
        problems.add(f"its tensors fill {position:,} bytes; at most {MAX_BYTES:,} are read")
