"""Rounding a merged weight to the dtype in which it is stored, and the cost of it.

A weight W in bf16 keeps 8 bits. A delta d much smaller than W falls between two of its values: at ||d||/||W|| = 0.1 the stored delta
differs from d by 1.7 %, at 0.01 by 17 %, at 0.003 by half, at 0.001 by four fifths. With k = round(W + d) - round(W), the stored delta,

    error   ||k - d|| / ||d||      everything that differs, noise included
    kept    <k, d> / ||d||^2       the share of d itself that is still there

A quantized format is a coarser rounding: k = Q(W + d) - Q(W). If W is already a value of the format, as in a base that was quantized, a
delta of less than half a step changes nothing, and most of it is lost.

"nearest" rounds to the nearest number. "stochastic" rounds up or down with probabilities that make the mean exact: kept stays at one
for deltas that nearest would lose, and the noise is larger.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor


def round_to(wide: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """``wide`` in ``dtype``: to nearest, or stochastically (fp32 to bf16 only) where a generator is given."""
    if generator is None or dtype != torch.bfloat16:
        return wide.to(dtype)
    # bf16 is the upper half of fp32. Random bits added to the lower half carry into the upper with the right probability.
    bits = wide.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator)
    return ((bits + noise) & -65536).view(torch.float32).to(dtype)


@dataclass
class RoundingTotals:
    """Sums over the elements of one weight, added to block by block."""

    delta: float = 0.0
    lost: float = 0.0
    along: float = 0.0
    weight: float = 0.0
    changed: int = 0
    unmoved: int = 0
    remaining: float = 0.0
    """The square of what is lost even with the residual adapter."""
    returned: float = 0.0
    """The inner product of the residual adapter's delta with the exact one."""
    apart: float = 0.0
    """The square of the difference of the stored weight from the exact one."""

    def add(self, base: Tensor, delta: Tensor, stored: Tensor, exact: Tensor) -> None:
        """Add one block: the base weight as it would be stored, the exact delta (fp32 or wider), the stored weight and the exact one."""
        kept = stored.to(delta.dtype) - base.to(stored.dtype).to(delta.dtype)
        self.delta += float(delta.double().square().sum())
        self.lost += float((kept - delta).double().square().sum())
        self.along += float((kept.double() * delta.double()).sum())
        self.weight += float(base.double().square().sum())
        self.apart += float((stored.to(exact.dtype) - exact).double().square().sum())
        moved = delta != 0
        self.changed += int(moved.sum())
        self.unmoved += int((moved & (kept == 0)).sum())

    def __add__(self, other: RoundingTotals) -> RoundingTotals:
        return RoundingTotals(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    @property
    def ratio(self) -> float:
        """||d|| / ||W||."""
        return math.sqrt(self.delta / self.weight) if self.weight else math.inf

    @property
    def distance(self) -> float:
        """||stored - (W + d)|| / ||W||."""
        return math.sqrt(self.apart / self.weight) if self.weight else 0.0

    @property
    def error(self) -> float:
        """||k - d|| / ||d||."""
        return math.sqrt(self.lost / self.delta) if self.delta else 0.0

    @property
    def kept(self) -> float:
        """<k, d> / ||d||^2."""
        return self.along / self.delta if self.delta else 1.0

    @property
    def unchanged(self) -> float:
        """Share of the elements with a nonzero delta whose stored value did not change."""
        return self.unmoved / self.changed if self.changed else 0.0

    @property
    def left(self) -> float:
        """The error with the residual adapter."""
        return math.sqrt(self.remaining / self.delta) if self.delta else 0.0

    @property
    def kept_with_residual(self) -> float:
        """The kept share with the residual adapter."""
        return (self.along + self.returned) / self.delta if self.delta else 1.0
