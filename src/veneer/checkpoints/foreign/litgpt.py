"""LitGPT's adapters: the tensors of ``lit_model.pth.lora`` as safetensors, beside ``hyperparameters.yaml``.

    transformer.h.3.attn.qkv       q, k and v behind each other      lora_A [n r, in]    lora_B [rows of the n, r]
    transformer.h.3.attn.proj, .mlp.fc_1, .mlp.fc_2, .mlp.fc, .mlp.proj, lm_head          lora_A [r, in]   lora_B [out, r]

The change is lora_alpha / r times B A. qkv holds those n of the three that were adapted (``lora_query``, ``lora_key``, ``lora_value``),
each with r rows of A and its rows of B. The result depends on the base:

    q_proj, k_proj, v_proj         three sites of rank r
    qkv_proj (Phi-3)               one site: A stacked, B block by block, rank n r; likewise gate_up_proj of fc_1 and fc_2
    query_key_value (GPT-NeoX)     the same with B's rows head by head, q k v in turn, as that base has them

Boundary: experts and bases with other fused layers are refused by name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site
from veneer.checkpoints.findings import shown
from veneer.checkpoints.foreign.factors import (
    HYPERPARAMETERS,
    LITGPT,
    ForeignFactors,
    adapter_of,
    check_rank,
    read_foreign_tensors,
    sites_by_block,
)
from veneer.config import load_yaml
from veneer.errors import CheckpointError, Problems

_KEY = re.compile(r"(?:transformer\.h\.(\d+)\.)?([a-z0-9_.]+)\.(lora_[AB])")
_SAME: Mapping[str, tuple[str, ...]] = {
    "attn.proj": ("self_attn.o_proj", "self_attn.dense", "attention.dense"),
    "mlp.fc": ("mlp.fc1", "mlp.dense_h_to_4h"),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj", "mlp.fc2", "mlp.dense_4h_to_h"),
    "lm_head": ("lm_head", "embed_out"),
}
"""LitGPT's name of a layer in a block -> transformers' names of the same."""
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FLAGS = ("lora_query", "lora_key", "lora_value")
_PARTS_BY_FLAG = {
    **dict.fromkeys(_FLAGS, "attn.qkv"),
    "lora_projection": "attn.proj",
    "lora_mlp": "mlp.",
    "lora_head": "lm_head",
}
"""Setting -> the start of the names of the layers that it adapts."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a layer of the base, which one layer of LitGPT is; None means all of them."""

    site: Site
    rows: Tensor | None = None

    @property
    def count(self) -> int:
        return self.site.geometry.out if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class _Piece:
    """Factors of some rows of a layer."""

    target: _Rows
    a_RK: Tensor
    b_OR: Tensor


class _Misfit(Exception):
    """A layer cannot be imported; the message is the reason."""


def read_litgpt(
    path: Path,
    name: str,
    sites: Mapping[str, Site],
    config: Mapping[str, Any],
    *,
    scale: float | None = None,
    force: Iterable[str] = (),
) -> tuple[Adapter, str | None]:
    """The adapter in LitGPT's folder, and the checkpoint that it names. config: the base's config.json. scale: instead of alpha / r.
    force: checks to override.

    Raises CheckpointError with what is wrong with it, or does not fit the base.
    """
    settings = _settings(path)
    pairs = _pairs(read_foreign_tensors(path, LITGPT), path / LITGPT)
    check_rank(settings.get("lora_r"), (b_OR.shape[1] for _, b_OR in pairs.values()), str(path / HYPERPARAMETERS))
    layers = _BaseLayers(sites, config, settings)
    pieces: dict[str, list[_Piece]] = {}
    problems = Problems()
    for (block, part), (a_RK, b_OR) in pairs.items():
        try:
            for piece in layers.pieces(block, part, a_RK, b_OR):
                pieces.setdefault(piece.target.site.name, []).append(piece)
        except _Misfit as misfit:
            problems.add(f"{_layer(block, part)}: {misfit}")
    for flag, start in _PARTS_BY_FLAG.items():
        if settings.get(flag) is True and not any(part.startswith(start) for _, part in pairs):
            problems.add(f"{HYPERPARAMETERS} says {flag}, and {LITGPT} has no factors of {start}")
    problems.raise_if_any(CheckpointError, f"{path} cannot be imported", limit=8)
    found = {site: _joined(parts, _scale(settings, parts[0], scale, path)) for site, parts in pieces.items()}
    adapter = adapter_of(found, sites, name, str(path), dropout=settings.get("lora_dropout"), force=force)
    source = settings.get("checkpoint_dir")
    return adapter, shown(source) if isinstance(source, str) else None


class _BaseLayers:
    """The base's layers by LitGPT's names."""

    def __init__(self, sites: Mapping[str, Site], config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.config, self.settings, self.sites = config, settings, sites
        self.by_block = sites_by_block(sites)

    def pieces(self, block: int | None, part: str, a_RK: Tensor, b_OR: Tensor) -> list[_Piece]:
        """One pair of factors as those of the base's layers. Raises _Misfit."""
        if block not in self.by_block:
            raise _Misfit("the base has no such block")
        here = {tail: self.sites[name] for tail, name in self.by_block[block].items()}
        targets, r = self._targets(here, part), b_OR.shape[1]
        if part == "lm_head":  # LitGPT pads the vocabulary; rows beyond the base's are of tokens that do not exist
            b_OR = b_OR[: targets[0].count]
        if len(targets) > 1:
            chosen = self._chosen([target.count for target in targets], len(a_RK) // r, len(b_OR))
            targets = [targets[i] for i in chosen]
        sizes, inputs = [target.count for target in targets], targets[0].site.geometry.in_
        if a_RK.shape != (r * len(targets), inputs) or len(b_OR) != sum(sizes):
            raise _Misfit(
                f"it has {a_RK.shape[1]} inputs and {len(b_OR)} outputs, and the base {inputs} and {sum(sizes)}"
            )
        return [_Piece(*piece) for piece in zip(targets, a_RK.split(r), b_OR.split(sizes), strict=True)]

    def _targets(self, here: Mapping[str, Site], part: str) -> list[_Rows]:
        """The base's layers, or rows of them, that make up a layer of LitGPT, in its order."""
        if part == "attn.qkv":
            return self._qkv(here)
        if site := next((here[name] for name in _SAME.get(part, ()) if name in here), None):
            return [_Rows(site)]
        if part in ("mlp.fc_1", "mlp.fc_2") and "mlp.gate_up_proj" in here:
            site = here["mlp.gate_up_proj"]
            return [_Rows(site, torch.arange(site.geometry.out).chunk(2)[part == "mlp.fc_2"])]
        raise _Misfit("the base has no layer that corresponds to it")

    def _qkv(self, here: Mapping[str, Site]) -> list[_Rows]:
        if all(name in here for name in _QKV):
            return [_Rows(here[name]) for name in _QKV]
        heads = self.config.get("num_attention_heads")
        if "self_attn.qkv_proj" in here and isinstance(heads, int):
            site = here["self_attn.qkv_proj"]
            groups = self.config.get("num_key_value_heads") or heads
            size = site.geometry.out // (heads + 2 * groups)
            rows = torch.arange(site.geometry.out).split([heads * size, groups * size, groups * size])
            return [_Rows(site, part) for part in rows]
        if "attention.query_key_value" in here and isinstance(heads, int):
            site = here["attention.query_key_value"]
            by_head = torch.arange(site.geometry.out).reshape(heads, 3, -1)
            return [_Rows(site, by_head[:, part].flatten()) for part in range(3)]
        raise _Misfit("the base's attention is not of a kind whose layers are known here")

    def _chosen(self, sizes: Sequence[int], count: int, rows: int) -> tuple[int, ...]:
        """Indices of those of q, k and v that are adapted, from the settings, or from the shapes if these leave one answer."""
        flags = [self.settings.get(flag) for flag in _FLAGS]
        fitting = [c for c in itertools.combinations(range(3), count) if sum(sizes[i] for i in c) == rows]
        if all(isinstance(flag, bool) for flag in flags):
            declared = tuple(i for i, flag in enumerate(flags) if flag)
            if declared not in fitting:
                names = " and ".join(_FLAGS[i][5:] for i in declared)
                raise _Misfit(f"{count} x {rows} rows are not those of {names} in this base")
            return declared
        if not fitting:
            raise _Misfit(f"{rows} rows of B do not fit the base's q, k and v")
        if len(fitting) > 1:
            raise _Misfit(
                f"its shapes do not say which of q, k and v it adapts; {HYPERPARAMETERS} beside it would ({', '.join(_FLAGS)})"
            )
        return fitting[0]


def _settings(path: Path) -> Mapping[str, Any]:
    file = path / HYPERPARAMETERS
    return load_yaml(file).values if file.is_file() else {}


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> dict[tuple[int | None, str], tuple[Tensor, Tensor]]:
    """{(block, layer): (A, B)}, of every tensor."""
    found: dict[tuple[int | None, str], dict[str, Tensor]] = {}
    problems = Problems()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            problems.add(
                f"{shown(key)} is not a factor that is known (expected transformer.h.N.LAYER.lora_A or .lora_B)"
            )
        elif match[2] == "attn.attn":
            problems.add(
                f"{shown(key)} is of a LitGPT before 0.5, whose q, k and v lie head by head; load and save it with a newer one"
            )
        else:
            pair = found.setdefault((None if match[1] is None else int(match[1]), match[2]), {})
            if match[3] in pair:
                problems.add(f"{shown(key)} stands there under two names")
            pair[match[3]] = tensor
    for (block, part), pair in found.items():
        if len(pair) != 2:
            problems.add(f"{_layer(block, part)} has only one of its two factors")
        elif len(pair["lora_A"]) % pair["lora_B"].shape[1]:
            rows, columns = len(pair["lora_A"]), pair["lora_B"].shape[1]
            problems.add(f"{part}: A has {rows} rows, no multiple of B's {columns} columns")
    problems.raise_if_any(CheckpointError, f"{file} cannot be imported", limit=8)
    return {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in found.items()}


def _layer(block: int | None, part: str) -> str:
    return part if block is None else f"block {block}, {part}"


def _scale(settings: Mapping[str, Any], piece: _Piece, given: float | None, path: Path) -> float:
    if given is not None:
        return given
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(
            f"{path} does not say lora_alpha ({HYPERPARAMETERS}), without which the change is not known; give lora_alpha / r with --scale X"
        )
    return float(alpha) / piece.b_OR.shape[1]


def _joined(pieces: Sequence[_Piece], scale: float) -> ForeignFactors:
    """One pair of factors of all pieces of a layer: A stacked, B with each piece's columns in its rows."""
    target = pieces[0].target
    if target.rows is None:
        return ForeignFactors(pieces[0].a_RK, pieces[0].b_OR, scale)
    b_OR = torch.zeros(target.site.geometry.out, sum(piece.b_OR.shape[1] for piece in pieces))
    columns = b_OR.split([piece.b_OR.shape[1] for piece in pieces], dim=1)
    for piece, part in zip(pieces, columns, strict=True):
        part[piece.target.rows] = piece.b_OR
    return ForeignFactors(torch.cat([piece.a_RK for piece in pieces]), b_OR, scale)
