"""From deltas back to an adapter: as LoRA where they are factors, as a method with a magnitude where they have a gain.

A delta B A + diag(g) W is a DoRA adapter exactly, no matter how many LoRA and DoRA adapters were summed to get it: with S = 1 + g

    W' = W + diag(g) W + B A = S (W + B' A),      B' = B / S,      m = S ||W + B' A||_row

So sums of DoRA adapters need no decomposition and lose nothing. A dense delta becomes LoRA through its best approximation of a rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.methods import LoRA, LowRankMethod
from veneer.deltas.delta import SiteDelta
from veneer.errors import ComposeError

Form = Literal["auto", "lora", "dora"]
Tensors = dict[str, Tensor]
MAX_RANK = 4096


def site_tensors(site: str, delta: SiteDelta, method: LowRankMethod, weight_OK: Tensor | None = None) -> Tensors:
    """A site's tensors at scale one, fp32, in the form of a method; empty where there is no change.

    Raises:
        ComposeError: the method cannot hold the delta, its rank is too large, or fp32 cannot hold its values.
    """
    if not delta.rank and delta.gain_O is None and delta.dense_OK is None:
        return {}
    if delta.dense_OK is not None or (delta.gain_O is not None and not method.needs_base_weights):
        raise ComposeError(f"{site}: the change is dense, and an adapter needs a rank; give --rank")
    if delta.rank > MAX_RANK:
        raise ComposeError(f"{site}: the rank is {delta.rank}, and the maximum is {MAX_RANK}; give --rank")
    b_OR, a_RK = delta.factors()
    if not delta.rank:  # a gain alone: factors of rank one that do nothing
        b_OR, a_RK = torch.zeros(delta.shape[0], 1), torch.zeros(1, delta.shape[1])
    tensors = method.tensors_of_delta(delta.geometry, delta.gain_O, a_RK, b_OR, weight_OK)
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise ComposeError(
            f"{site}: the change is larger than fp32 can hold; give smaller weights, or a smaller --scale"
        )
    return tensors


def assemble(
    tensors: Mapping[str, Tensors],
    kinds: Mapping[str, str],
    name: str,
    *,
    method: LowRankMethod | None = None,
    tied: bool = False,
    parameters: Iterable[str] = (),
) -> Adapter:
    """The adapter of scale one with these tensors; sites without any are left out.

    Args:
        method: the method whose tensors these are (default: LoRA); its options are not used.
        tied: the adapter also acts on the tied head.
        parameters: names of weights that PEFT reads by ``target_parameters`` (``checkpoints/peft/portable.py``).

    Raises:
        ComposeError: no site has tensors.
    """
    kept = {site: held for site, held in tensors.items() if held}
    if not kept:
        raise ComposeError("nothing is left: the change is zero at every site")
    ranks = {site: int(next(iter(held.values())).shape[0]) for site, held in kept.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {site: rank for site, rank in ranks.items() if rank != usual}
    made = type(method or LoRA())(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern={site: float(rank) for site, rank in others.items()},
        target_modules=tuple(ranks),
        ensure_weight_tying=tied,
    )
    meta = {"settings": {"target_parameters": sorted(parameters)}}
    return Adapter(name, made, kept, {site: kinds[site] for site in kept}, meta=meta)
