"""Decompositions through Gram matrices, against LAPACK's SVD of the matrix itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.deltas.linalg import dense_spectrum, dense_svd_near, gram_eigh
from veneer.deltas.parallel import map_sites


def falling(rows: int, columns: int, least: float, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall evenly on a log scale from 1 to ``least``."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(
        torch.randn(rows, columns, dtype=torch.float64, generator=generator), full_matrices=False
    )
    return u @ torch.diag(torch.logspace(0, torch.tensor(least).log10(), len(vt), dtype=torch.float64)) @ vt


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_a_spectrum_keeps_its_small_values(shape: tuple[int, int]) -> None:
    """All values are the SVD's within 1e-9 of each, down to a millionth of the largest, and the leading vectors are its own."""
    matrix = falling(*shape, 1e-6)
    u, s, vt = dense_spectrum(matrix, 5)
    exact = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(s, exact.S, rtol=1e-9)
    assert torch.allclose((u * s[:5]) @ vt, (exact.U[:, :5] * exact.S[:5]) @ exact.Vh[:5], atol=1e-12)


def test_a_spectrum_of_low_rank_has_no_more_values() -> None:
    """Values beyond the rank of a dense matrix are below 1e-12 of the largest."""
    matrix = falling(60, 3, 0.1) @ falling(3, 40, 0.5)
    s = dense_spectrum(matrix, 5)[1]
    assert int((s > 1e-12 * s[0]).sum()) == 3


@pytest.mark.parametrize("size", [0.0, 1e-4, 0.05, 3.0])
@pytest.mark.parametrize("shape", [(200, 160), (160, 200)])
def test_a_nearby_matrix_is_decomposed_from_the_known_one(shape: tuple[int, int], size: float) -> None:
    """The leading triples are the SVD's within 1e-10, near the known matrix and far from it, where all is decomposed."""
    base = falling(*shape, 0.2)
    moved = base + size * falling(*shape, 1e-3, seed=1)
    u, s, vt = dense_svd_near(moved, 6, gram_eigh(base))
    exact = torch.linalg.svd(moved, full_matrices=False)
    assert torch.allclose(s, exact.S[:6], rtol=1e-10)
    assert torch.allclose((u.T @ exact.U[:, :6]).abs(), torch.eye(6, dtype=torch.float64), atol=1e-9)
    assert torch.allclose((vt @ exact.Vh[:6].T).abs(), torch.eye(6, dtype=torch.float64), atol=1e-9)


def test_a_change_beside_the_known_leading_directions_is_found() -> None:
    """Where the change does not touch the known leading directions at all, its own larger ones are still the leading triples."""
    base = falling(160, 128, 0.2)
    base[100:], base[:, 90:] = 0, 0
    block = torch.zeros_like(base)
    block[100:, 90:] = 20 * falling(60, 38, 0.1, seed=2)
    u, _, vt = torch.linalg.svd(base, full_matrices=False)
    small = 1.5 * torch.outer(u[:, -1], vt[-1])
    for moved in (base + block, base + small):
        s = dense_svd_near(moved, 6, gram_eigh(base))[1]
        assert torch.allclose(s, torch.linalg.svdvals(moved)[:6], rtol=1e-10)


def test_sites_are_mapped_in_order() -> None:
    """Results come in the order of the sites, errors are raised, and torch's number of threads is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert map_sites(lambda site: site + "x", list("abcdef")) == [f"{site}x" for site in "abcdef"]
        with pytest.raises(ZeroDivisionError):
            map_sites(lambda site: str(1 / 0), ["a"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
