"""Bases on this machine: the embedded ones and the complete models of the Hub's cache. Nothing is downloaded or loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import BaseModelError
from veneer.models.embedded import EMBEDDED, find_embedded


@dataclass(frozen=True, slots=True)
class LocalBase:
    """One base: the name that ``load_base`` takes, its source, model type and path, bytes on disk, number of weights (0 if unknown)."""

    name: str
    source: str
    model_type: str
    path: str
    bytes: int
    weights: int


def local_bases() -> Iterator[LocalBase]:
    """Yield the bases that can be loaded without a network, the embedded ones first."""
    for alias in EMBEDDED:
        try:
            yield _embedded(alias, find_embedded(alias))
        except BaseModelError:
            continue
    yield from _hub_cache()


def _embedded(alias: str, path: Path) -> LocalBase:
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        return LocalBase(alias, "embedded", _model_type(path), str(path), size, sum(map(_weights, files)))
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return LocalBase(alias, "embedded", str(architecture), str(path), path.stat().st_size, weights)


def _hub_cache() -> Iterator[LocalBase]:
    """Yield the cached Hub models that have a config.json and safetensors; adapters and other repositories are left out."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda found: found.repo_id.lower()):
        newest = max(repository.revisions, key=lambda found: found.last_modified, default=None)
        if repository.repo_type != "model" or newest is None:
            continue
        folder = newest.snapshot_path
        files = sorted(folder.glob("*.safetensors"))
        if files and (folder / "config.json").is_file():
            size = sum(file.stat().st_size for file in files)
            weights = sum(map(_weights, files))
            yield LocalBase(repository.repo_id, "hub cache", _model_type(folder), str(folder), size, weights)


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "?"))
    except (OSError, ValueError, AttributeError):
        return "?"


def _weights(file: Path) -> int:
    """Count the weights of a safetensors file from its header; 0 if the header cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return 0
