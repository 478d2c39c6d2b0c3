"""Model folders, read and written one tensor at a time: safetensors shards with their index, configuration and tokenizer.

    base = ModelFolder(path)                    # keys, shapes and dtypes; no tensor is read until it is asked for
    with write_model(base, out, config) as writer:
        writer.put("model.norm.weight", tensor)

A shard is written, read back and compared before the next one begins, so the memory needed is one shard. Everything is written into a
folder beside ``out``, flushed and renamed: ``out`` is complete or absent.

Boundary: files only; the caller decides the content of a tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer._files import publish
from veneer._locks import lock
from veneer.checkpoints.tensors import save_tensors
from veneer.errors import CheckpointError
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.models.sources import json_object

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
SHARD_BYTES = 2 << 30
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NEVER = ("adapter_config.json", "config.json")
_UNFINISHED = ".unfinished-"


@dataclass
class ModelFolder:
    """A folder of safetensors with a config.json: which tensor lies in which file."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    """Tensor name -> file, in the order of the files."""

    def __post_init__(self) -> None:
        self.config = json_object(self.path / "config.json", CheckpointError)
        for file in _weight_files(self.path):
            with _open(file) as opened:
                for key in opened.keys():  # noqa: SIM118 - safetensors has no iteration of its own
                    if key in self.files:
                        raise CheckpointError(
                            f"{self.path}: the tensor {key} is in both {self.files[key].name} and {file.name}; "
                            "remove the file that does not belong to this model"
                        )
                    self.files[key] = file

    def get(self, key: str) -> Tensor:
        """One tensor, as stored."""
        return read_tensor(self.files[key], key)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return stored_shape(self.files[key], key)

    def quantized(self, key: str) -> QuantizedWeight | None:
        """A tensor as a quantized weight; None for a plain one."""
        return None

    def format(self, key: str) -> str | None:
        """The format of a quantized weight; None for a plain one."""
        return None

    def dtypes(self) -> set[str]:
        """The floating-point dtypes of the stored weights, as safetensors calls them: F32, BF16, F16, F64, F8_E4M3, ..."""
        found = set()
        for file in dict.fromkeys(self.files.values()):
            with _open(file) as opened:
                found |= {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
        return {name for name in found if "F" in name}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file by file; each is released when the next is asked for."""
        for file in dict.fromkeys(self.files.values()):
            with _open(file) as opened:
                for key in opened.keys():  # noqa: SIM118
                    yield key, opened.get_tensor(key)

    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in set(self.files.values()))


def read_tensor(file: Path, key: str) -> Tensor:
    """One tensor of a safetensors file."""
    with _open(file) as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def stored_shape(file: Path, key: str) -> tuple[int, ...]:
    """The shape of a tensor of a safetensors file, from the header."""
    with _open(file) as opened:
        return tuple(opened.get_slice(key).get_shape())


class ModelWriter:
    """Takes tensors and writes shards of about ``shard_bytes``; each is read back before the next begins."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = max(1, shard_bytes)
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def put(self, key: str, tensor: Tensor) -> None:
        """Take one tensor; a full shard goes to the disk first."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.shard_bytes:
            self._flush()
        self._held[key] = tensor.detach().contiguous()
        self._held_bytes += size
        self.total_bytes += size

    def finish(self) -> list[Path]:
        """Write what is held and the index; returns the weight files."""
        if self._held:
            self._flush()
        if len(self._shards) == 1:
            only = self._shards[0][0].rename(self.folder / "model.safetensors")
            return [only]
        weight_map: dict[str, str] = {}
        files = []
        for number, (shard, keys) in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            files.append(shard.rename(self.folder / name))
            weight_map.update(dict.fromkeys(keys, name))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return files

    def _flush(self) -> None:
        file = self.folder / f"shard-{len(self._shards):05d}"
        save_tensors(self._held, file, {"format": "pt"})
        with _open(file) as opened:
            for key, tensor in self._held.items():
                # bits, not values: NaN is unequal to itself
                if not torch.equal(_bits(opened.get_tensor(key)), _bits(tensor)):
                    raise CheckpointError(f"{file}: {key} does not read back as it was written; check the disk")
        self._shards.append((file, list(self._held)))
        self._held, self._held_bytes = {}, 0


@contextlib.contextmanager
def write_model(
    base: ModelFolder,
    out: Path,
    config: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[Path], None] | None = None,
) -> Iterator[ModelWriter]:
    """A writer for ``out``, which gets the base's tokenizer and settings too, and appears when the context ends without an error.

    Args:
        base: the model whose other files are copied.
        out: the new folder.
        config: content of the new config.json.
        shard_bytes: size of a shard.
        check: called with the finished folder before it is renamed; raises to stop it.

    Raises:
        CheckpointError: ``out`` is not empty, or cannot be written.
    """
    check_free(out)
    asked, out = out, out.absolute()
    aside = held = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_unfinished(out)
        aside = out.with_name(f"{_UNFINISHED}{out.name}-{secrets.token_hex(4)}")
        aside.mkdir()
        held = _lock(aside)
        writer = ModelWriter(aside, shard_bytes)
        yield writer
        writer.finish()
        copy_companions(base.path, aside)
        (aside / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if check is not None:
            check(aside)
        publish(aside, out)
    except OSError as error:
        if aside is not None and not _lies_in(error.filename, aside):
            raise  # something else than the writing, such as a file of the base
        reason = (
            "a parent of it is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        )
        raise CheckpointError(
            f"{asked} cannot be written: {reason}; choose another folder, or free some space"
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if held is not None:
            os.close(held)


def _clear_unfinished(out: Path) -> None:
    """Remove unfinished folders of killed processes; a process that still runs holds a lock on its folder."""
    left = re.compile(re.escape(f"{_UNFINISHED}{out.name}-") + r"[^-]+")
    for folder in [path for path in out.parent.iterdir() if left.fullmatch(path.name) and path.is_dir()]:
        if (held := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def _lock(folder: Path) -> int | None:
    """A handle that locks the folder; None if it is locked, or the system has no such locks."""
    with contextlib.suppress(OSError):
        return lock(folder)
    return None


def check_free(out: Path) -> None:
    """Raise CheckpointError unless ``out`` is absent or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        kind = "a folder that is not empty" if out.is_dir() else "a file"
        raise CheckpointError(f"{out} is {kind}; choose another folder, or remove it")


def copy_companions(source: Path, target: Path) -> None:
    """Take over tokenizer, templates, generation settings and licence: small files that describe, never weights or code."""
    for file in sorted(source.iterdir()):
        known = file.suffix in _COMPANIONS or file.name.upper().startswith(("LICENSE", "NOTICE"))
        unfit = file.name in _NEVER or file.name.endswith(".index.json") or file.name.startswith(".")
        if file.is_file() and known and not unfit:
            shutil.copyfile(file, target / file.name)


def set_end_tokens(folder: Path, ids: list[int]) -> None:
    """Set ``eos_token_id`` in a folder's generation_config.json; a new file also takes the other special tokens of config.json."""
    config, file = json_object(folder / "config.json", CheckpointError), folder / GENERATION
    named = {key: config[key] for key in ("bos_token_id", "pad_token_id") if type(config.get(key)) is int}
    held = json_object(file, CheckpointError) if file.is_file() else named
    content = {**held, "eos_token_id": ids if len(ids) > 1 else ids[0]}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weight_files(folder: Path) -> list[Path]:
    """The files of the index where there is one, else model.safetensors, else every .safetensors."""
    index = folder / INDEX
    if index.is_file():
        names = json_object(index, CheckpointError).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{index}: expected a weight_map of names; download the file again")
        shards = list(dict.fromkeys(names.values()))
        files = [folder / name for name in shards]
        missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{index} names {', '.join(missing)}, which the folder lacks; download the files again"
            )
        return files
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors; expected a model's folder")
    return files


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}; download the file again") from error
    with opened:
        yield opened


def _lies_in(name: object, folder: Path) -> bool:
    """The file of an error lies in a folder; errors of an open file name none."""
    return name is None or Path(os.fsdecode(str(name))).is_relative_to(folder)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
