"""Singular values through factors where there are factors, and through the smaller Gram matrix where there are none.

    B A = (Q_b R_b) (Q_a R_a)^T = Q_b (R_b R_a^T) Q_a^T         one QR of each factor and an SVD of r x r

costs O((d + k) r^2), where a dense SVD of d x k costs O(d k min(d, k)) and its memory. Everything is computed in fp64, so the error is
that of the input. Shapes: O out, K in, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]
_GRAM_UP_TO = 2048
_WELL_CONDITIONED = 1e-3
_OVERSAMPLE = 16
_ITERATIONS = 4


def factored_svd(b_OR: Tensor, a_RK: Tensor) -> Svd:
    """U [O, r], S [r], Vt [r, K] of b @ a in fp64, r = min(R, O, K), S in descending order."""
    q_b, r_b = torch.linalg.qr(b_OR.detach().double())
    q_a, r_a = torch.linalg.qr(a_RK.detach().double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def factored_norm(b_OR: Tensor, a_RK: Tensor) -> float:
    """||b @ a||_F without the product: ||R_b a||_F, which does not cancel as a difference of squares would."""
    if not b_OR.shape[1]:
        return 0.0
    r_b = torch.linalg.qr(b_OR.detach().double(), mode="r").R
    return float((r_b @ a_RK.detach().double()).norm())


def dense_svd(matrix_OK: Tensor, rank: int, seed: int = 0) -> Svd:
    """The leading ``rank`` singular triples of a dense matrix, fp64.

    Up to 2048 on the smaller side they come from the eigenvectors of the smaller Gram matrix, in fp64, which is exact to
    sqrt(eps) = 1.5e-8 of the largest. Above that they come from subspace iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4)
    with a seeded start, whose error for a falling spectrum is far below that of the truncation itself.
    """
    rank = min(rank, *matrix_OK.shape)
    if min(matrix_OK.shape) <= _GRAM_UP_TO:
        return _by_gram(matrix_OK, gram_eigh(matrix_OK)[1][:, :rank])
    return _by_iteration(matrix_OK, rank, seed)


def dense_spectrum(matrix_OK: Tensor, rank: int, seed: int = 0) -> Svd:
    """The leading ``rank`` singular vectors of a dense matrix and all of its singular values: U [O, r], S [min(O, K)], Vt [r, K], fp64.

    A value s has the error eps s_1^2 / s; values below 1e-7 of the largest are rounding and zero.
    """
    if min(matrix_OK.shape) > _GRAM_UP_TO:
        u, _, vt = _by_iteration(matrix_OK, rank, seed)
        return u, _without_rounding(torch.linalg.eigvalsh(_gram(matrix_OK)).flip(0)), vt
    values, vectors = gram_eigh(matrix_OK)
    u, s, vt = _by_gram(matrix_OK, vectors[:, :rank])
    return u, torch.cat([s, _without_rounding(values)[len(s) :]]), vt


def gram_eigh(matrix_OK: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors of the smaller Gram matrix: of W W^T where O <= K, else of W^T W; fp64."""
    values, vectors = torch.linalg.eigh(_gram(matrix_OK))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _without_rounding(eigenvalues: Tensor) -> Tensor:
    s = eigenvalues.clamp_min(0).sqrt()
    return torch.where(s > 1e-7 * s[:1], s, 0.0)


def _gram(matrix: Tensor) -> Tensor:
    small = matrix.detach() if matrix.shape[0] <= matrix.shape[1] else matrix.detach().T
    gram = torch.zeros(small.shape[0], small.shape[0], dtype=torch.float64)
    for block in small.split(4096, dim=1):
        wide = block.double()
        gram.addmm_(wide, wide.T)
    return gram


def _by_gram(matrix: Tensor, vectors: Tensor) -> Svd:
    """Singular triples from the leading eigenvectors of the smaller Gram matrix."""
    flipped = matrix.shape[0] > matrix.shape[1]
    # One product with the matrix itself gives values and the other side to full precision, where the Gram matrix squared them.
    other = (matrix.detach().double().T if not flipped else matrix.detach().double()) @ vectors
    s = other.norm(dim=0)
    if len(s) and bool(s.min() > _WELL_CONDITIONED * s.max()):
        along = other / s  # orthogonal to eps / 1e-3^2
        return (along, s, vectors.T) if flipped else (vectors, s, along.T)
    q, r = torch.linalg.qr(other)
    u_small, s, vt_small = torch.linalg.svd(r, full_matrices=False)
    across, along = q @ u_small, vectors @ vt_small.T
    return (across, s, along.T) if flipped else (along, s, across.T)


def _by_iteration(matrix: Tensor, rank: int, seed: int) -> Svd:
    wide = matrix.detach().double()
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + _OVERSAMPLE, *wide.shape)
    q = torch.linalg.qr(wide @ torch.randn(wide.shape[1], width, dtype=wide.dtype, generator=generator)).Q
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ q).Q).Q
    u, s, vt = torch.linalg.svd(q.T @ wide, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vt[:rank]
