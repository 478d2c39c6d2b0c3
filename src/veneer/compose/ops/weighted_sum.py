"""sum: sum_i w_i d_i, exact for every method. With negative weights it is task arithmetic (Ilharco et al. 2022, arXiv 2212.04089).

Factors are concatenated, gains added; nothing is approximated, and nothing of the size of the weight is made.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.compose.ops.base import Operation, Place
from veneer.deltas.delta import SiteDelta, weighted_sum


def _sum(parts: Sequence[SiteDelta], weights: Sequence[float], place: Place) -> SiteDelta:
    return weighted_sum(parts, weights)


OPERATION = Operation("sum", "the weighted sum of the changes, exact; negative weights take away", _sum, exact=True)
