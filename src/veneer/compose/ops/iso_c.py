"""iso-c: the weighted sum with all its singular values set to their mean (Marczak et al. 2025, arXiv 2502.04959).

    U S Vt = sum_i w_i d_i,      result = mean(S) U Vt

The mean is taken over the nonzero values. The formula was made for full-rank deltas; a sum of low-rank deltas has directions that hold
nothing, and these would otherwise be filled with arbitrary ones. ``scale`` is the paper's alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from veneer.adapters.adapter import Adapter
from veneer.compose.ops.base import Operation, OperationSettings, SiteContext
from veneer.deltas.delta import SiteDelta, geometry_of, weighted_sum
from veneer.deltas.svd import from_svd, nonzero, svd_of
from veneer.errors import ComposeError

_LEAST_SHARE = 0.5
"""The share of a full-rank result below which a cut to a rank is refused: with equal singular values the kept directions are arbitrary."""


def _iso_c(parts: Sequence[SiteDelta], weights: Sequence[float], context: SiteContext) -> SiteDelta:
    total = weighted_sum(parts, weights)
    u, s, vt = svd_of(total, None if total.factored else context.weight())
    kept = nonzero(s)
    if not bool(kept.any()):
        return SiteDelta(total.geometry)
    return from_svd(total, u[:, kept], s[kept].mean().expand(int(kept.sum())), vt[kept])


def _check(adapters: Sequence[Adapter], settings: OperationSettings, limit: Callable[[str], float]) -> None:
    for adapter in adapters:
        if not adapter.method.needs_base_weights:
            continue
        for site in adapter.tensors:
            geometry = geometry_of(adapter, site)
            full = min(geometry.out, geometry.fan_in)
            if (rank := limit(site)) < _LEAST_SHARE * full:
                raise ComposeError(
                    f'iso-c makes all singular values equal, and with the {adapter.method.label} adapter "{adapter.name}" there are '
                    f"{full} of them at {site}: rank {rank:g} would keep {rank / full:.0%} of the result, in arbitrary directions; "
                    f"use --op sum, compose LoRA adapters only, or give --rank {math.ceil(_LEAST_SHARE * full)} or more"
                )


OPERATION = Operation("iso-c", "the weighted sum with equal singular values", _iso_c, check=_check)
