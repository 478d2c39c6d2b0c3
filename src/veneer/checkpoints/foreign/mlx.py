"""mlx-lm's adapters: ``adapters.safetensors`` beside ``adapter_config.json``.

    <layer>.lora_a [in, r]     <layer>.lora_b [r, out]     y = W x + scale * (x lora_a) lora_b          (LoRA)
    <layer>.m [out]            m / ||W + scale * lora_b^T lora_a^T||_row times that, bias outside       (DoRA)

Both factors are the transposes of PEFT's. ``lora_parameters.scale`` multiplies the product, where PEFT divides lora_alpha by the rank:
lora_alpha = scale * r. An embedding's lora_a is [vocabulary, r]. Inside a block layers have the names of transformers.

Boundary: experts (lora_a of three dimensions) and full fine-tunes are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site
from veneer.checkpoints.files import Folder, parse_json
from veneer.checkpoints.findings import shown
from veneer.checkpoints.foreign.factors import (
    CONFIG,
    MLX,
    ForeignFactors,
    adapter_of,
    check_rank,
    read_foreign_tensors,
    sites_by_block,
)
from veneer.errors import CheckpointError, Problems

_PARTS = ("lora_a", "lora_b", "m")
_BLOCK = re.compile(r"\.(\d+)\.")
_MOST_CONFIG = 2 << 20


def read_mlx(
    path: Path, name: str, sites: Mapping[str, Site], *, scale: float | None = None, force: Iterable[str] = ()
) -> tuple[Adapter, str | None]:
    """The adapter in mlx-lm's folder, and the model that the folder names. scale: instead of the one in its settings. force: checks to
    override.

    Raises CheckpointError with what is wrong with it, or does not fit the base's ``sites``.
    """
    settings = _settings(path)
    found_parameters = settings.get("lora_parameters")
    parameters: Mapping[str, Any] = found_parameters if isinstance(found_parameters, Mapping) else {}
    kind = settings.get("fine_tune_type", "lora")
    if kind == "full":
        raise CheckpointError(
            f"{path} is a full fine-tune, not an adapter; fuse it with mlx_lm.fuse and use veneer extract"
        )
    if kind not in ("lora", "dora"):
        raise CheckpointError(f"{path / CONFIG}: fine_tune_type is {shown(kind, 40)}; expected lora or dora")
    chosen = _scale(parameters, path) if scale is None else scale
    layers = _layers(read_foreign_tensors(path, MLX), path / MLX)
    if any("m" in tensors for tensors in layers.values()) != (kind == "dora"):
        has = "no layer has" if kind == "dora" else "layers have"
        raise CheckpointError(
            f"{path / CONFIG} says fine_tune_type {kind}, and {has} a magnitude (.m) in {MLX}; get both files from the same run"
        )
    check_rank(parameters.get("rank"), (tensors["lora_b"].shape[0] for tensors in layers.values()), str(path / CONFIG))
    found: dict[str, ForeignFactors] = {}
    known = sites_by_block(sites)
    for layer, tensors in layers.items():
        site = _site(layer, sites, known)
        if site in found:
            raise CheckpointError(f"{path / MLX} has factors for {site} under two names")
        found[site] = ForeignFactors(tensors["lora_a"].T, tensors["lora_b"].T, chosen, tensors.get("m"))
    count = settings.get("num_layers", settings.get("lora_layers"))  # -1 means all
    last = max(count, 0) if isinstance(count, int) and not isinstance(count, bool) else None
    dropout = parameters.get("dropout")
    adapter = adapter_of(found, sites, name, str(path), dropout=dropout, last_blocks=last, force=force)
    model = settings.get("model")
    return adapter, shown(model) if isinstance(model, str) else None


def _settings(path: Path) -> dict[str, Any]:
    with Folder(path) as folder:
        if CONFIG not in folder:
            raise CheckpointError(f"{path} holds no {CONFIG}, which says how {MLX} is scaled")
        found = parse_json(folder.read(CONFIG, _MOST_CONFIG), str(path / CONFIG))
    if not isinstance(found, dict):
        raise CheckpointError(f"{path / CONFIG}: expected an object of settings")
    return found


def _scale(parameters: Mapping[str, Any], path: Path) -> float:
    """The factor of the product. Early releases multiplied it by alpha / rank, later ones read past an alpha: that is not guessed."""
    scale = parameters.get("scale")
    if not _is_number(scale):
        raise CheckpointError(
            f"{path / CONFIG} does not say the scale (lora_parameters.scale), without which the change is not known; give it with --scale X"
        )
    if "alpha" in parameters:
        raise CheckpointError(
            f"{path / CONFIG} has both alpha {shown(parameters['alpha'], 20)} and scale {scale:g}: mlx-lm up to 0.9 multiplies by "
            "scale * alpha / rank, later ones by scale; say which with --scale X"
        )
    return float(scale)


def _layers(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """{layer: {lora_a, lora_b, m}}, of every tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    problems = Problems()
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if part not in _PARTS or not layer:
            problems.add(f"{shown(key)} is not part of an adapter (expected names that end in .lora_a, .lora_b or .m)")
        elif part != "m" and tensor.dim() == 3:
            problems.add(f"{shown(key)} is of a layer of experts, which cannot be imported")
        elif tensor.dim() != (1 if part == "m" else 2):
            problems.add(f"{shown(key)} has {tensor.dim()} dimensions")
        else:
            found.setdefault(layer, {})[part] = tensor
    if not problems:
        for layer, parts in found.items():
            for missing in sorted({"lora_a", "lora_b"} - set(parts)):
                problems.add(f"{shown(layer)} has no {missing}")
        if len({"m" in parts for parts in found.values()}) > 1:
            problems.add("some layers have a magnitude (.m) and others none")
    problems.raise_if_any(CheckpointError, f"{file} cannot be imported", limit=8)
    return found


def _site(layer: str, sites: Mapping[str, Site], known: Mapping[int | None, Mapping[str, str]]) -> str:
    """The base's name of a layer. Some models have another name above their blocks there (``model.h.3.`` for ``transformer.h.3.``)."""
    if layer in sites:
        return layer
    match = _BLOCK.search(layer)
    block, tail = (None, layer.rpartition(".")[2]) if match is None else (int(match[1]), layer[match.end() :])
    return known.get(block, {}).get(tail, layer)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
