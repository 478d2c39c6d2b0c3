"""ties: keep each change's largest elements, elect a sign for each element, average who agrees (Yadav et al. 2023, arXiv 2306.01708).

    trim    t_i = d_i where |d_i| is among the largest ``density`` share of its elements, else 0
    elect   sign = sign(sum_i w_i t_i)
    mean    sum of w_i t_i over sum of |w_i|, over those i with t_i != 0 and sign(w_i t_i) = sign

With equal weights this is the paper's disjoint mean; ``scale`` is its lambda. The paper trims over all weights of a model together, and
here, as in the implementations that people use, each site is trimmed by itself. The result is dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.compose.ops.base import Operation, Place
from veneer.deltas.delta import SiteDelta
from veneer.errors import ComposeError


def _ties(parts: Sequence[SiteDelta], weights: Sequence[float], place: Place) -> SiteDelta:
    density = place.settings.density
    if not 0 < density <= 1:
        raise ComposeError(f"density: expected a share above 0 and up to 1, found {density:g}")
    weight_OK = place.weight()
    trimmed = [w * _trim(part.dense(weight_OK), density) for part, w in zip(parts, weights, strict=True)]
    elected = _sum(trimmed).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for voice, weight in zip(trimmed, weights, strict=True):
        agrees = (voice != 0) & (voice.sign() == elected)
        total += torch.where(agrees, voice, 0.0)
        count += agrees * abs(weight)
    return SiteDelta(parts[0].geometry, dense_OK=torch.where(count > 0, total / count.clamp_min(1e-300), 0.0))


def _sum(changes: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(changes[0])
    for change in changes:
        total += change
    return total


def _trim(change: Tensor, density: float) -> Tensor:
    keep = max(1, round(density * change.numel()))
    if keep >= change.numel():
        return change
    threshold = float(change.abs().flatten().kthvalue(change.numel() - keep + 1).values)
    return torch.where(change.abs() >= threshold, change, 0.0)


OPERATION = Operation("ties", "trim to the largest elements, elect signs, average who agrees", _ties)
