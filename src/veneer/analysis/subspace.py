"""How much the directions of two changes have in common (LoRA, arXiv 2106.09685, section 7.2).

    phi(i, j) = || U_i^T V_j ||_F^2 / min(i, j)      U_i the first i singular vectors of one change, V_j the first j of the other

1 means that one span holds the other, 0 that they are orthogonal. For random spans of a space of n dimensions it is max(i, j) / n. It is
1 - d^2 / p of the projection metric d, p = min(i, j). "in" compares what the changes read (right vectors), "out" what they write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.deltas.linalg import Svd
from veneer.deltas.svd import alive


@dataclass(frozen=True)
class Subspaces:
    """phi(i, j) for i and j from 1, on both sides; what chance gives for the whole spans, max(i, j) / n; and the cosine of the changes
    themselves as vectors."""

    phi_in: tuple[tuple[float, ...], ...]
    phi_out: tuple[tuple[float, ...], ...]
    chance_in: float
    chance_out: float
    cosine: float

    @property
    def whole_in(self) -> float:
        """phi of the whole spans, of what is read."""
        return self.phi_in[-1][-1] if self.phi_in and self.phi_in[-1] else 0.0

    @property
    def whole_out(self) -> float:
        """phi of the whole spans, of what is written."""
        return self.phi_out[-1][-1] if self.phi_out and self.phi_out[-1] else 0.0


def phi(one: Tensor, other: Tensor) -> Tensor:
    """phi(i, j) for all i up to I and j up to J, from orthonormal columns [n, I] and [n, J]; result [I, J] in [0, 1]."""
    squares = (one.T @ other).square()
    sums = squares.cumsum(0).cumsum(1)
    i = torch.arange(1, sums.shape[0] + 1).unsqueeze(1)
    j = torch.arange(1, sums.shape[1] + 1)
    return (sums / torch.minimum(i, j)).clamp(0, 1)


def subspaces(one: Svd, other: Svd, most: int = 64, most_other: int = 64) -> Subspaces:
    """Compare the leading ``most`` and ``most_other`` singular vectors of two changes at one site."""
    (u, s, vt), (u2, s2, vt2) = _leading(one, most), _leading(other, most_other)
    size = float(one[1].norm() * other[1].norm())
    inner = float(((one[0].T @ other[0]) * (one[2] @ other[2].T) * torch.outer(one[1], other[1])).sum())
    widest = max(len(s), len(s2))
    return Subspaces(
        _rows(phi(vt.T, vt2.T)),
        _rows(phi(u, u2)),
        min(1.0, widest / vt.shape[1]),
        min(1.0, widest / u.shape[0]),
        inner / size if size else 0.0,
    )


def _leading(svd: Svd, most: int) -> Svd:
    u, s, vt = svd
    keep = min(most, int(alive(s).sum()))
    return u[:, :keep], s[:keep], vt[:keep]


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(value, 6) for value in row) for row in matrix.tolist())
