"""ties: keep each delta's largest elements, elect a sign for each element, average those that agree (Yadav et al. 2023, arXiv 2306.01708).

    trim    t_i = d_i where |d_i| is among the largest ``density`` share of its elements, else 0
    elect   sign = sign(sum_i w_i t_i)
    mean    sum of w_i t_i over sum of |w_i|, over those i with t_i != 0 and sign(w_i t_i) = sign

With equal weights this is the paper's disjoint mean; ``scale`` is its lambda. The paper trims over all weights of a model together; here,
as in the common implementations, each site is trimmed by itself. The result is dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.compose.ops.base import Operation, SiteContext
from veneer.deltas.delta import SiteDelta
from veneer.errors import ComposeError


def _ties(parts: Sequence[SiteDelta], weights: Sequence[float], context: SiteContext) -> SiteDelta:
    density = context.settings.density
    if not 0 < density <= 1:
        raise ComposeError(f"density: expected a share above 0 and up to 1, found {density:g}")
    weight_OK = context.weight()
    trimmed = [w * _trim(part.dense(weight_OK), density) for part, w in zip(parts, weights, strict=True)]
    elected = sum(trimmed[1:], trimmed[0]).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for vote, weight in zip(trimmed, weights, strict=True):
        agrees = (vote != 0) & (vote.sign() == elected)
        total += torch.where(agrees, vote, 0.0)
        count += agrees * abs(weight)
    return SiteDelta(parts[0].geometry, dense_OK=torch.where(count > 0, total / count.clamp_min(1e-300), 0.0))


def _trim(delta: Tensor, density: float) -> Tensor:
    keep = max(1, round(density * delta.numel()))
    if keep >= delta.numel():
        return delta
    threshold = float(delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values)
    return torch.where(delta.abs() >= threshold, delta, 0.0)


OPERATION = Operation(
    "ties",
    "trim to the largest elements, elect signs, average those that agree",
    _ties,
    dense=True,
    options=("density",),
)
