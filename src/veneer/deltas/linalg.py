"""Singular values through factors where there are factors, and through the smaller Gram matrix where there are none.

    B A = (Q_b R_b) (Q_a R_a)^T = Q_b (R_b R_a^T) Q_a^T         one QR of each factor and an SVD of r x r

costs O((d + k) r^2), where a dense SVD of d x k costs O(d k min(d, k)) and its memory. Everything is computed in fp64, so the error is
that of the input. Shapes: O out, K in, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]
Eigen = tuple[Tensor, Tensor]
_GRAM_UP_TO = 2048
_GRAM_ROWS = 192
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


def dense_spectrum(matrix_OK: Tensor, rank: int) -> Svd:
    """All singular values of a dense matrix and its leading ``rank`` singular vectors: U [O, r], S [min(O, K)], Vt [r, K], fp64."""
    values, vectors = gram_eigh(matrix_OK)
    u, _, vt = _by_gram(matrix_OK, vectors[:, :rank])
    s = values.sqrt()
    small = s < _WELL_CONDITIONED * s[:1]
    if bool(small.any()):  # the square root of an eigenvalue has lost them, and ||M v|| has not
        wide = matrix_OK.detach().double()
        s[small] = ((wide.T if wide.shape[0] <= wide.shape[1] else wide) @ vectors[:, small]).norm(dim=0)
    return u, s.sort(descending=True).values, vt


def gram_eigh(matrix_OK: Tensor) -> Eigen:
    """Eigenvalues, largest first, and eigenvectors of the smaller Gram matrix: of W W^T where O <= K, else of W^T W; fp64."""
    values, vectors = torch.linalg.eigh(_gram(matrix_OK))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def dense_svd_near(matrix_OK: Tensor, rank: int, near: Eigen) -> Svd:
    """`dense_svd` of a matrix that is close to one with a known `gram_eigh`, at a fraction of the cost of a decomposition.

    Block Davidson iteration: Rayleigh-Ritz in the known leading eigenvectors, which grow by the residuals with the known decomposition as
    preconditioner, until residuals are below 1e-13 of the largest eigenvalue. That shows that the pairs are eigenpairs; a Cholesky
    factorization shows that they are the leading ones. Without either, the matrix is decomposed.
    """
    gram, (values, vectors) = _gram(matrix_OK), near
    gram = gram.tril() + gram.tril(-1).T
    rank = min(rank, len(values))
    basis = vectors[:, : 2 * rank + _OVERSAMPLE]
    while basis.shape[1] < min(len(values), 8 * (rank + _OVERSAMPLE)):
        product = gram @ basis
        ritz, small = torch.linalg.eigh(basis.T @ product)
        ritz, small = ritz[-rank:].flip(0), small[:, -rank:].flip(1)
        leading = basis @ small
        residual = product @ small - leading * ritz
        if float(residual.norm(dim=0).max()) <= 1e-13 * float(ritz[0]):
            if _are_leading(gram, leading, ritz):
                return _by_gram(matrix_OK, leading)
            break
        shift = values.unsqueeze(1) - ritz
        shift = torch.where(shift.abs() < 1e-6 * values[0], 1e-6 * values[0], shift)
        basis = torch.linalg.qr(torch.cat([basis, vectors @ ((vectors.T @ residual) / shift)], dim=1)).Q
    return _by_gram(matrix_OK, torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank])


def _are_leading(gram: Tensor, vectors: Tensor, values: Tensor) -> bool:
    """True if no other eigenvalue is larger than the last of ``values``: sigma I - (G - V diag(values) V^T) is positive definite."""
    sigma = torch.maximum(values[-1] * (1 + 1e-9), 1e-12 * values[0])
    shifted = (vectors * values) @ vectors.T - gram
    shifted.diagonal().add_(sigma)
    return int(torch.linalg.cholesky_ex(shifted).info) == 0


def _gram(matrix: Tensor) -> Tensor:
    """The smaller Gram matrix, fp64; above the diagonal blocks it is zero, because eigh reads the lower triangle only."""
    small = matrix.detach() if matrix.shape[0] <= matrix.shape[1] else matrix.detach().T
    size = small.shape[0]
    gram = torch.zeros(size, size, dtype=torch.float64, device=matrix.device)
    for block in small.split(4096, dim=1):
        wide = block.double()
        for start in range(0, size, _GRAM_ROWS):
            stop = start + _GRAM_ROWS
            gram[start:stop, :stop].addmm_(wide[start:stop], wide[:stop].T)
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
    start = torch.randn(wide.shape[1], width, dtype=wide.dtype, generator=generator).to(wide.device)  # alike on all
    q = torch.linalg.qr(wide @ start).Q
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ q).Q).Q
    u, s, vt = torch.linalg.svd(q.T @ wide, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vt[:rank]
