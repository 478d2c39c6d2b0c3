"""dare: drop elements of each delta at random, rescale the rest, add (Yu et al. 2023, arXiv 2311.03099).

    sum_i w_i  z_i * d_i / (1 - drop),      z_i 0 with probability ``drop``, else 1, element by element

Its expectation is the weighted sum itself. The result is dense; the random draw is a function of seed and site.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.compose.ops.base import Operation, SiteContext
from veneer.deltas.delta import SiteDelta
from veneer.errors import ComposeError


def _dare(parts: Sequence[SiteDelta], weights: Sequence[float], context: SiteContext) -> SiteDelta:
    drop = context.settings.drop
    if not 0 <= drop < 1:
        raise ComposeError(f"drop: expected a probability of 0 or more and below 1, found {drop:g}")
    generator, weight_OK = context.generator(), context.weight()
    total = torch.zeros(parts[0].shape, dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        delta = part.dense(weight_OK)
        kept = torch.rand(delta.shape, generator=generator) >= drop
        total += torch.where(kept, delta * (weight / (1 - drop)), 0.0)
    return SiteDelta(parts[0].geometry, dense_OK=total)


OPERATION = Operation(
    "dare",
    "drop elements at random, rescale the rest, then add with weights",
    _dare,
    dense=True,
    options=("drop", "seed"),
)
