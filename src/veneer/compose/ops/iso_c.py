"""iso-c: the weighted sum with all its singular values set to their mean (Marczak et al. 2025, arXiv 2502.04959).

    U S Vt = sum_i w_i d_i,      result = mean(S) U Vt

The mean goes over the values that are not zero. The formula was made for full-rank changes; the directions in which a sum of low-rank
changes holds nothing would otherwise be filled with arbitrary ones. ``scale`` is the paper's alpha.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.compose.ops.base import Operation, Place
from veneer.deltas.delta import SiteDelta, weighted_sum
from veneer.deltas.svd import alive, from_svd, svd_of


def _iso_c(parts: Sequence[SiteDelta], weights: Sequence[float], place: Place) -> SiteDelta:
    total = weighted_sum(parts, weights)
    u, s, vt = svd_of(total, None if total.factored else place.weight())
    some = alive(s)
    if not bool(some.any()):
        return SiteDelta(total.geometry)
    return from_svd(total, u[:, some], s[some].mean().expand(int(some.sum())), vt[some])


OPERATION = Operation("iso-c", "the weighted sum with equal singular values", _iso_c)
