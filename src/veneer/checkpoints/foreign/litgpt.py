"""LitGPT's adapters: the tensors of ``lit_model.pth.lora`` as safetensors, beside ``hyperparameters.yaml``.

    transformer.h.3.attn.qkv       q, k and v behind each other      lora_A [n r, in]    lora_B [rows of the n, r]
    transformer.h.3.attn.proj, .mlp.fc_1, .mlp.fc_2, .mlp.fc, .mlp.proj, lm_head          lora_A [r, in]   lora_B [out, r]

The change is lora_alpha / r times B A. At qkv only those n of the three that were adapted are there (``lora_query``, ``lora_key``,
``lora_value``), each with its own r rows of A and its own rows of B. What it becomes depends on the base:

    q_proj, k_proj, v_proj         three sites of rank r
    qkv_proj (Phi-3)               one site: A stacked, B block by block, rank n r; likewise gate_up_proj of fc_1 and fc_2
    query_key_value (GPT-NeoX)     the same with B's rows head by head, q k v in turn, as that base has them

Boundary: experts and bases with other fused layers are refused by name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
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
    places,
    read_foreign_tensors,
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


@dataclass(frozen=True)
class _Piece:
    """ForeignFactors that belong to some rows of a base's layer; None means all of them."""

    site: str
    rows: Tensor | None
    a_RK: Tensor
    b_OR: Tensor


class _Misfit(Exception):
    """A layer cannot be imported; the message is the reason."""


def read_litgpt(
    path: Path, name: str, sites: Mapping[str, Site], config: Mapping[str, Any], *, scale: float | None = None
) -> tuple[Adapter, str | None]:
    """The adapter in LitGPT's folder, and the checkpoint that it names. config: the base's config.json. scale: instead of alpha / r.

    Raises CheckpointError with what is wrong with it, or does not fit the base.
    """
    settings = _settings(path)
    pairs = _pairs(read_foreign_tensors(path, LITGPT), path / LITGPT)
    where = _Where(sites, config, settings)
    pieces: dict[str, list[_Piece]] = {}
    problems = Problems()
    for (block, part), (a_RK, b_OR) in pairs.items():
        try:
            for piece in where.pieces(block, part, a_RK, b_OR):
                pieces.setdefault(piece.site, []).append(piece)
        except _Misfit as misfit:
            problems.add(f"{'' if block is None else f'block {block}, '}{part}: {misfit}")
    problems.raise_if_any(CheckpointError, f"{path} cannot be imported", limit=8)
    found = {site: _joined(own, sites[site], _scale(settings, own[0], scale, path)) for site, own in pieces.items()}
    adapter = adapter_of(found, sites, name, str(path), dropout=settings.get("lora_dropout"))
    named = settings.get("checkpoint_dir")
    return adapter, shown(named) if isinstance(named, str) else None


class _Where:
    """The base's layers by LitGPT's names."""

    def __init__(self, sites: Mapping[str, Site], config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.config, self.settings = config, settings
        self.sites = sites
        self.by_block = places(sites)

    def pieces(self, block: int | None, part: str, a_RK: Tensor, b_OR: Tensor) -> Iterator[_Piece]:
        """The base's layers, and their rows, that one pair of factors acts on. Raises _Misfit."""
        here = self.by_block.get(block)
        if here is None:
            raise _Misfit("the base has no such block")
        if part == "attn.qkv":
            yield from self._qkv(here, a_RK, b_OR)
            return
        site = next((here[name] for name in _SAME.get(part, ()) if name in here), None)
        if site is not None:
            out = self.sites[site].geometry.out
            # LitGPT pads the vocabulary; rows beyond the base's are of tokens that do not exist.
            yield _Piece(site, None, a_RK, b_OR[:out] if part == "lm_head" else b_OR)
        elif part in ("mlp.fc_1", "mlp.fc_2") and "mlp.gate_up_proj" in here:
            half = self.sites[here["mlp.gate_up_proj"]].geometry.out // 2
            _check(self.sites[here["mlp.gate_up_proj"]], a_RK, b_OR, half)
            yield _Piece(here["mlp.gate_up_proj"], torch.arange(half) + half * (part == "mlp.fc_2"), a_RK, b_OR)
        else:
            raise _Misfit("the base has no layer that this one stands for")

    def _qkv(self, here: Mapping[str, str], a_RK: Tensor, b_OR: Tensor) -> Iterator[_Piece]:
        three = self._places(here)
        r = b_OR.shape[1]
        chosen = self._chosen([_size(self.sites[site], rows) for site, rows in three], a_RK.shape[0] // r, len(b_OR))
        sizes = [_size(self.sites[site], rows) for site, rows in (three[i] for i in chosen)]
        for i in chosen:
            _check(self.sites[three[i][0]], a_RK, b_OR, sum(sizes))
        for i, a, b in zip(chosen, a_RK.split(r), b_OR.split(sizes), strict=True):
            yield _Piece(*three[i], a, b)

    def _places(self, here: Mapping[str, str]) -> list[tuple[str, Tensor | None]]:
        """(layer, its rows) of q, k and v."""
        if all(name in here for name in _QKV):
            return [(here[name], None) for name in _QKV]
        heads = self.config.get("num_attention_heads")
        if "self_attn.qkv_proj" in here and isinstance(heads, int):
            site = here["self_attn.qkv_proj"]
            out = self.sites[site].geometry.out
            groups = self.config.get("num_key_value_heads") or heads
            size = out // (heads + 2 * groups)
            rows = torch.arange(out).split([heads * size, groups * size, groups * size])
            return [(site, part) for part in rows]
        if "attention.query_key_value" in here and isinstance(heads, int):
            site = here["attention.query_key_value"]
            rows = torch.arange(self.sites[site].geometry.out).reshape(heads, 3, -1)
            return [(site, rows[:, part].flatten()) for part in range(3)]
        raise _Misfit("the base's attention is not of a kind whose layers are known here")

    def _chosen(self, sizes: Sequence[int], count: int, rows: int) -> tuple[int, ...]:
        """Indices of those of q, k and v that are adapted, from the settings, or from the shapes if these leave one answer."""
        flags = [self.settings.get(flag) for flag in _FLAGS]
        fitting = [c for c in itertools.combinations(range(3), count) if sum(sizes[i] for i in c) == rows]
        if all(isinstance(flag, bool) for flag in flags):
            told = tuple(i for i, flag in enumerate(flags) if flag)
            if told not in fitting:
                raise _Misfit(
                    f"{count} x {rows} rows are not those of {' and '.join(_FLAGS[i][5:] for i in told)} in this base"
                )
            return told
        if not fitting:
            raise _Misfit(f"{rows} rows of B do not fit the base's q, k and v")
        if len(fitting) > 1:
            raise _Misfit(
                f"its shapes do not say which of q, k and v it adapts; {HYPERPARAMETERS} beside it would ({', '.join(_FLAGS)})"
            )
        return fitting[0]


def _check(site: Site, a_RK: Tensor, b_OR: Tensor, rows: int) -> None:
    inputs = site.geometry.in_
    if a_RK.shape[1] != inputs or len(b_OR) != rows:
        raise _Misfit(f"it has {a_RK.shape[1]} inputs and {len(b_OR)} outputs, and the base {inputs} and {rows}")


def _settings(path: Path) -> Mapping[str, Any]:
    file = path / HYPERPARAMETERS
    return load_yaml(file).values if file.is_file() else {}


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> dict[tuple[int | None, str], tuple[Tensor, Tensor]]:
    """{(block, layer): (A, B)}, every tensor in its place."""
    found: dict[tuple[int | None, str], dict[str, Tensor]] = {}
    problems = Problems()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            problems.add(f"{shown(key)} is no factor that is known (expected transformer.h.N.LAYER.lora_A or .lora_B)")
        elif match[2] == "attn.attn":
            problems.add(
                f"{shown(key)} is of a LitGPT before 0.5, whose q, k and v lie head by head; load and save it with a newer one"
            )
        else:
            found.setdefault((None if match[1] is None else int(match[1]), match[2]), {})[match[3]] = tensor
    for (block, part), own in found.items():
        if len(own) != 2:
            problems.add(f"{'' if block is None else f'block {block}, '}{part} has only one of its two factors")
        elif own["lora_A"].shape[0] % own["lora_B"].shape[1]:
            problems.add(
                f"{part}: A has {own['lora_A'].shape[0]} rows, no multiple of B's {own['lora_B'].shape[1]} columns"
            )
    problems.raise_if_any(CheckpointError, f"{file} cannot be imported", limit=8)
    return {place: (own["lora_A"], own["lora_B"]) for place, own in found.items()}


def _scale(settings: Mapping[str, Any], piece: _Piece, given: float | None, path: Path) -> float:
    if given is not None:
        return given
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(
            f"{path} does not say lora_alpha ({HYPERPARAMETERS}), without which the change is not known; give lora_alpha / r with --scale X"
        )
    return float(alpha) / piece.b_OR.shape[1]


def _joined(pieces: Sequence[_Piece], site: Site, scale: float) -> ForeignFactors:
    """One pair of factors of all that acts on a layer: A stacked, B with each part's columns in its own rows."""
    if len(pieces) == 1 and pieces[0].rows is None:
        return ForeignFactors(pieces[0].a_RK, pieces[0].b_OR, scale)
    b_OR = torch.zeros(site.geometry.out, sum(piece.b_OR.shape[1] for piece in pieces))
    at = 0
    for piece in pieces:
        assert piece.rows is not None
        b_OR[piece.rows, at : at + piece.b_OR.shape[1]] = piece.b_OR
        at += piece.b_OR.shape[1]
    return ForeignFactors(torch.cat([piece.a_RK for piece in pieces]), b_OR, scale)


def _size(site: Site, rows: Tensor | None) -> int:
    return site.geometry.out if rows is None else len(rows)
