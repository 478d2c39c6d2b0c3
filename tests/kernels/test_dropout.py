"""Dropout masks: the listed elements are those of the reference, parts of a mask are computed alone, and the numbers are random enough."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from veneer.kernels import cpp_library
from veneer.kernels.lora.dropout import Dropout, drop, mask, places, zero_
from veneer.training.cpp_kernels import use_cpp_kernels

KNOWN = [6, 9, 39, 48, 111, 153, 154, 164]


@pytest.fixture
def cpp() -> Iterator[None]:
    """The kernels in C++."""
    before = cpp_library.folder()
    use_cpp_kernels()
    if cpp_library.library() is None:
        pytest.skip(cpp_library.reason())
    yield
    cpp_library.use(before)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.05, 0.5, 0.99, 0.9999999])
@pytest.mark.usefixtures("cpp")
def test_the_kernel_lists_the_elements_of_the_reference(p: float) -> None:
    """For sizes below and above a block, and with less room than elements are dropped."""
    for count in (0, 1, 5, 1024, 5000):
        assert places(count, Dropout(p, 3)).tolist() == mask(count, Dropout(p, 3)).nonzero().squeeze(1).tolist()


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("window", [(3, 6, 15), (1, 3, 7), (0, 2, 4), (2, 0, 4)])
@pytest.mark.parametrize("width", [1, 3, 8, 1000])
def test_a_window_is_a_part_of_the_mask(window: tuple[int, int, int], width: int) -> None:
    """Rows that several processes share are dropped as one process drops them."""
    first, rows, total = window
    whole = mask(total * width, Dropout(0.3, 7))[first * width : (first + rows) * width]
    part = Dropout(0.3, 7, window)
    assert torch.equal(mask(rows * width, part), whole)
    assert places(rows * width, part).tolist() == whole.nonzero().squeeze(1).tolist()


def test_known_numbers() -> None:
    """The elements of one seed, on every machine and version."""
    assert mask(200, Dropout(0.05, 1234)).nonzero().squeeze(1).tolist() == KNOWN


def test_the_numbers_are_independent() -> None:
    """The share that is dropped is p; masks of neighbouring seeds, and neighbouring elements, have nothing in common."""
    count, seeds = 1 << 16, 48
    signs = torch.stack([mask(count, Dropout(0.5, seed)).float() for seed in range(seeds)]) * 2 - 1
    deviation = count**-0.5
    assert signs.mean(1).abs().max() < 4.5 * deviation
    common = (signs @ signs.T / count).fill_diagonal_(0)
    assert common.abs().max() < 5 * deviation
    for lag in (1, 2, 3, 4, 5, 64, 576):
        assert (signs[:, lag:] * signs[:, :-lag]).mean().abs() < 5 * deviation / seeds**0.5
    for p in (0.01, 0.05, 0.3):
        share = mask(count, Dropout(p, 1)).float().mean().item()
        assert abs(share - p) < 5 * (p * (1 - p)) ** 0.5 * deviation


def test_indices_and_masks_hide_the_same() -> None:
    """Both forms of what is hidden set the same elements to zero, and the differentiable form scales the others."""
    x = torch.arange(1.0, 201.0)
    dropout = Dropout(0.25, 5)
    hidden = mask(200, dropout)
    assert torch.equal(zero_(x.clone(), places(200, dropout)), zero_(x.clone(), hidden))
    x.requires_grad_()
    y = drop(x, *dropout)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, (~hidden).float() / 0.75)
