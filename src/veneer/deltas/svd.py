"""Decompositions of a delta, and its best approximation of a rank.

Factors are decomposed through factors (one QR each and a small SVD); a dense decomposition is made only of a delta that is dense by
nature or has a gain (DoRA written as LoRA). Shapes: O out, K in, R rank. fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.deltas.delta import LowRankTerm, SiteDelta
from veneer.deltas.linalg import Svd, dense_spectrum, dense_svd, factored_svd

ROUNDING = 1e-12
"""Singular values below this share of the largest are rounding."""


def svd_of(delta: SiteDelta, weight_OK: Tensor | None = None, rank: int | None = None) -> Svd:
    """U [O, r], S [r], Vt [r, K] of a delta, S in descending order; r is the largest possible, or ``rank``."""
    if delta.factored:
        u, s, vt = factored_svd(*delta.factors())
        return (u, s, vt) if rank is None else (u[:, :rank], s[:rank], vt[:rank])
    return dense_svd(delta.dense(weight_OK), min(delta.shape) if rank is None else rank)


def spectrum_of(delta: SiteDelta, weight_OK: Tensor | None, rank: int) -> Svd:
    """All singular values of a delta and its leading ``rank`` singular vectors: U [O, r], S, Vt [r, K]."""
    if delta.factored:
        u, s, vt = factored_svd(*delta.factors())
        return u[:, :rank], s, vt[:rank]
    return dense_spectrum(delta.dense(weight_OK), rank)


def nonzero(s: Tensor) -> Tensor:
    """A mask of the singular values that are more than rounding."""
    if not len(s):
        return torch.zeros(0, dtype=torch.bool)
    return (s > ROUNDING * s.max()) & (s > 0)


def inner_product(one: SiteDelta, other: SiteDelta, weight_OK: Tensor | None = None) -> float:
    """<d, e> of two deltas as vectors, through the factors where there are factors."""
    if one.factored and other.factored:
        (b1_OR, a1_RK), (b2_OR, a2_RK) = one.factors(), other.factors()
        return float(((b1_OR.T @ b2_OR) * (a1_RK @ a2_RK.T)).sum())
    if one.factored or other.factored:
        thin, full = (one, other) if one.factored else (other, one)
        b_OR, a_RK = thin.factors()
        return float((b_OR * (full.dense(weight_OK) @ a_RK.T)).sum())
    return float((one.dense(weight_OK) * other.dense(weight_OK)).sum())


def from_svd(like: SiteDelta, u: Tensor, s: Tensor, vt: Tensor) -> SiteDelta:
    """U diag(S) Vt as one term, each factor with the square root of S."""
    root = s.clamp_min(0).sqrt()
    return SiteDelta(like.geometry, (LowRankTerm(1.0, u * root, root.unsqueeze(1) * vt),))


def truncated(
    delta: SiteDelta, *, rank: int | None = None, energy: float | None = None, weight_OK: Tensor | None = None
) -> SiteDelta:
    """The best delta of rank ``rank`` at most, or of the least rank that keeps the share ``energy`` of ||d||_F^2.

    Best in the Frobenius norm (Eckart and Young 1936). Singular values that are rounding are left out, so the rank may be lower.
    """
    u, s, vt = svd_of(delta, weight_OK, rank if energy is None else None)
    keep = int(nonzero(s).sum())
    if energy is not None and keep:
        keep = min(keep, rank_for(s, energy))
    if rank is not None:
        keep = min(keep, rank)
    return from_svd(delta, u[:, :keep], s[:keep], vt[:keep])


def rank_for(s: Tensor, energy: float) -> int:
    """The least rank that keeps the share ``energy`` of the squares of the singular values ``s``."""
    cumulated = s.square().cumsum(0)
    # A share of one must not ask for more than there is because of the last bit of a sum.
    target = energy * float(cumulated[-1]) * (1 - 1e-15)
    return min(len(s), int(torch.searchsorted(cumulated, target)) + 1)
