"""Singular values the cheap way: through factors where there are factors, through the smaller Gram matrix where there are none.

    B A = (Q_b R_b) (Q_a R_a)^T = Q_b (R_b R_a^T) Q_a^T         one QR of each factor and an SVD of r x r

costs O((d + k) r^2) where a dense SVD of d x k costs O(d k min(d, k)) and its memory. Everything is computed in fp64, so that what is
left over is the rounding of what came in. Shapes: O out, K in, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]
_GRAM_UP_TO = 2048
_OVERSAMPLE = 16
_ITERATIONS = 4


def factored_svd(b_OR: Tensor, a_RK: Tensor) -> Svd:
    """U [O, r], S [r], Vt [r, K] of b @ a in fp64, r = min(R, O, K); S falls from left to right."""
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
    sqrt(eps) = 1.5e-8 of the largest. Above that by subspace iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4) from a
    seeded start, whose error for a spectrum that falls is far below that of the truncation itself.
    """
    rank = min(rank, *matrix_OK.shape)
    if min(matrix_OK.shape) <= _GRAM_UP_TO:
        return _by_gram(matrix_OK, rank)
    return _by_iteration(matrix_OK, rank, seed)


def singular_values(matrix_OK: Tensor) -> Tensor:
    """All singular values of a dense matrix, largest first, fp64, by its smaller Gram matrix."""
    values: Tensor = torch.linalg.eigvalsh(_gram(matrix_OK))
    return values.flip(0).clamp_min(0).sqrt()


def _gram(matrix: Tensor) -> Tensor:
    small = matrix.detach() if matrix.shape[0] <= matrix.shape[1] else matrix.detach().T
    gram = torch.zeros(small.shape[0], small.shape[0], dtype=torch.float64)
    for block in small.split(4096, dim=1):
        wide = block.double()
        gram.addmm_(wide, wide.T)
    return gram


def _by_gram(matrix: Tensor, rank: int) -> Svd:
    flipped = matrix.shape[0] > matrix.shape[1]
    vectors = torch.linalg.eigh(_gram(matrix)).eigenvectors.flip(1)[:, :rank]
    # One product with the matrix itself gives values and the other side to full precision, where the Gram matrix squared them.
    other = (matrix.detach().double().T if not flipped else matrix.detach().double()) @ vectors
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
