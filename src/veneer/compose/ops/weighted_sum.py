"""sum: sum_i w_i d_i, exact for every method. With negative weights it is task arithmetic (Ilharco et al. 2022, arXiv 2212.04089).

Factors are concatenated and gains added; nothing is approximated, and no matrix of the weight's size is made.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.compose.ops.base import Operation, SiteContext
from veneer.deltas.delta import SiteDelta, weighted_sum


def _sum(parts: Sequence[SiteDelta], weights: Sequence[float], context: SiteContext) -> SiteDelta:
    return weighted_sum(parts, weights)


OPERATION = Operation("sum", "the weighted sum of the changes, exact; negative weights subtract", _sum, is_sum=True)
