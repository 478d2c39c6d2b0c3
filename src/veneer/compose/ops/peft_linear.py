"""peft_linear: PEFT's "linear", for users who must reproduce it. It adds factors, so it is not a sum of deltas.

    A = sum_i sign(w_i) sqrt|w_i s_i| A_i,      B = sum_i sqrt|w_i s_i| B_i

B A has cross terms B_i A_j: for two independent adapters its distance from their sum is as large as the sum. LoRA of equal rank only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.compose.ops.base import Operation, SiteContext
from veneer.deltas.delta import LowRankTerm, SiteDelta
from veneer.errors import ComposeError


def _linear(parts: Sequence[SiteDelta], weights: Sequence[float], context: SiteContext) -> SiteDelta:
    ranks = {part.rank for part in parts}
    if len(ranks) != 1 or any(len(part.terms) != 1 or not part.factored for part in parts):
        raise ComposeError(
            f"peft_linear adds factors, so it needs LoRA adapters of one rank, and at {context.site} these differ; use --op sum"
        )
    rank, (out, in_) = ranks.pop(), parts[0].shape
    b_OR, a_RK = torch.zeros(out, rank, dtype=torch.float64), torch.zeros(rank, in_, dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        term = part.terms[0]
        size = abs(weight * term.coefficient) ** 0.5
        a_RK += (size if weight >= 0 else -size) * term.a_RK.detach().double()
        b_OR += size * term.b_OR.detach().double()
    return SiteDelta(parts[0].geometry, (LowRankTerm(1.0, b_OR, a_RK),))


OPERATION = Operation(
    "peft_linear", "PEFT's sum of factors, which is not the sum of the changes", _linear, factor_wise=True
)
