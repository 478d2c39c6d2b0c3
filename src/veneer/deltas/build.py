"""From changes back to an adapter: as LoRA where they are factors, as DoRA where they have gains too.

A change B A + g W is a DoRA adapter exactly, whatever number of LoRA and DoRA adapters it was summed from: with S = 1 + g

    W' = W + g W + B A = S (W + B' A),      B' = B / S,      m = S ||W + B' A||_row

So sums of DoRA adapters need no decomposition and lose nothing. What is dense becomes LoRA by its best approximation of a rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.methods import DoRA, LoRA
from veneer.adapters.methods.dora import MAGNITUDE
from veneer.deltas.delta import SiteDelta
from veneer.errors import ComposeError

Form = Literal["auto", "lora", "dora"]
Tensors = dict[str, Tensor]
MAX_RANK = 4096
_SMALLEST_GAIN = 1e-6
_ELEMENTS_AT_ONCE = 1 << 22


def site_tensors(site: str, change: SiteDelta, weight_OK: Tensor | None = None) -> Tensors:
    """A site's tensors at scale one, fp32: LoRA's, or DoRA's where the base weight is given. Empty where there is no change.

    Raises ComposeError for a change that has no factors, for ranks above what adapters can have, and for numbers that fp32 cannot hold.
    """
    if not change.rank and change.gain_O is None and change.dense_OK is None:
        return {}
    if change.dense_OK is not None or (weight_OK is None and change.gain_O is not None):
        raise ComposeError(f"{site}: the change is dense; an adapter needs a rank")
    if change.rank > MAX_RANK:
        raise ComposeError(f"{site}: the rank is {change.rank}, and {MAX_RANK} is the most; give --rank")
    b_OR, a_RK = change.factors()
    if not change.rank:  # a gain alone: factors of rank one that do nothing
        b_OR, a_RK = torch.zeros(change.shape[0], 1), torch.zeros(1, change.shape[1])
    if weight_OK is None:
        return _shaped(site, change.geometry, b_OR, a_RK)
    gain_O = torch.ones(change.shape[0], dtype=torch.float64) if change.gain_O is None else 1 + change.gain_O
    # A row that is scaled to nothing cannot be divided by its gain; it keeps a millionth of itself.
    gain_O = torch.where(gain_O.abs() < _SMALLEST_GAIN, torch.full_like(gain_O, _SMALLEST_GAIN), gain_O)
    b_OR = (b_OR / gain_O.unsqueeze(1)).float()
    a_RK = a_RK.float()
    # The norm is taken of the factors as they are stored, so that rounding them does not move the gain.
    step = max(1, _ELEMENTS_AT_ONCE // change.shape[1])
    norms = [
        torch.addmm(rows.double(), b.double(), a_RK.double()).norm(dim=1)
        for rows, b in zip(weight_OK.split(step), b_OR.split(step), strict=True)
    ]
    return {**_shaped(site, change.geometry, b_OR, a_RK), MAGNITUDE: (gain_O * torch.cat(norms)).float()}


def assemble(
    tensors: Mapping[str, Tensors],
    kinds: Mapping[str, str],
    name: str,
    *,
    tied: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter of scale one with these tensors; sites without any are left out. tied: it acts on the tied head too.

    Raises ComposeError where nothing is left.
    """
    kept = {site: own for site, own in tensors.items() if own}
    if not kept:
        raise ComposeError("nothing is left: the change is zero at every site")
    ranks = {site: int(next(iter(own.values())).shape[0]) for site, own in kept.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {site: rank for site, rank in ranks.items() if rank != usual}
    dora = any(MAGNITUDE in own for own in kept.values())
    method = (DoRA if dora else LoRA)(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern={site: float(rank) for site, rank in others.items()},
        target_modules=tuple(ranks),
        ensure_weight_tying=tied,
    )
    return Adapter(name, method, kept, {site: kinds[site] for site in kept}, meta=meta)


def _shaped(site: str, geometry: Geometry, b_OR: Tensor, a_RK: Tensor) -> Tensors:
    """Factors in the names and shapes of files, fp32."""
    names = LoRA().tensor_names(geometry.kind)
    rank = a_RK.shape[0]
    shapes = (geometry.shape_a(rank), geometry.shape_b(rank))
    made = {
        name: value.float().reshape(shape).contiguous()
        for name, value, shape in zip(names, (a_RK, b_OR), shapes, strict=True)
    }
    for value in made.values():
        if not bool(torch.isfinite(value).all()):
            raise ComposeError(
                f"{site}: the change is larger than fp32 can hold; give smaller weights, or another --scale"
            )
    return made
