"""Overlap of the directions of two deltas (LoRA, arXiv 2106.09685, section 7.2).

    phi(i, j) = || U_i^T V_j ||_F^2 / min(i, j)      U_i the first i singular vectors of one delta, V_j the first j of the other

1 means that one span contains the other, 0 that they are orthogonal. For random spans of a space of n dimensions it is max(i, j) / n. It
is 1 - d^2 / p of the projection metric d, p = min(i, j). "in" compares input directions (right vectors), "out" output directions.

Adapters that were initialised from one seed start with equal A, so their input directions overlap before any training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.deltas.linalg import Svd
from veneer.deltas.svd import nonzero


@dataclass(frozen=True)
class Subspaces:
    """phi(i, j) for i and j from 1, on both sides; the value of random spans of full size, max(i, j) / n; and the cosine of the deltas as
    vectors."""

    phi_in: tuple[tuple[float, ...], ...]
    phi_out: tuple[tuple[float, ...], ...]
    chance_in: float
    chance_out: float
    cosine: float

    @property
    def whole_in(self) -> float:
        """phi of the full spans of input directions."""
        return self.phi_in[-1][-1] if self.phi_in and self.phi_in[-1] else 0.0

    @property
    def whole_out(self) -> float:
        """phi of the full spans of output directions."""
        return self.phi_out[-1][-1] if self.phi_out and self.phi_out[-1] else 0.0


def phi(one: Tensor, other: Tensor) -> Tensor:
    """phi(i, j) for all i up to I and j up to J, from orthonormal columns [n, I] and [n, J]; result [I, J] in [0, 1]."""
    squares = (one.T @ other).square()
    sums = squares.cumsum(0).cumsum(1)
    i = torch.arange(1, sums.shape[0] + 1).unsqueeze(1)
    j = torch.arange(1, sums.shape[1] + 1)
    return (sums / torch.minimum(i, j)).clamp(0, 1)


def subspaces(one: Svd, other: Svd, cosine: float) -> Subspaces:
    """Compare the leading singular vectors of two deltas at one site. cosine: of the deltas as vectors."""
    (u, s, vt), (u2, s2, vt2) = _nonzero(one), _nonzero(other)
    widest = max(len(s), len(s2))
    return Subspaces(
        _rows(phi(vt.T, vt2.T)),
        _rows(phi(u, u2)),
        min(1.0, widest / vt.shape[1]),
        min(1.0, widest / u.shape[0]),
        cosine,
    )


def _nonzero(svd: Svd) -> Svd:
    u, s, vt = svd
    keep = min(u.shape[1], int(nonzero(s).sum()))
    return u[:, :keep], s[:keep], vt[:keep]


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(value, 6) for value in row) for row in matrix.tolist())
