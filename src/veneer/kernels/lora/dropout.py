"""Dropout whose mask is a function of a seed alone.

    drop(x) = x * keep / (1 - p),   keep ~ Bernoulli(1 - p), independent per element

Drawing one random number per element is slow on a CPU: for a layer of 576 inputs it takes several times as long as the layer's own
product in bf16. With p small, the dropped elements are few, and the gaps between them are independent and geometric: so the gaps are
drawn instead, about p numbers per element, and their running sum says which elements are dropped. That is the same distribution,
exactly, and what has to be kept for backward is a short list of indices. Above `_SPARSE` one number per element is the cheaper way.

The generator is made from the seed on the spot: no global random state is read, and the same seed and size give the same mask again. It
is always the CPU's, so that every device drops the same elements; the indices are then moved.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Dropout", "drop", "dropped", "zero_"]

_SPARSE = 0.2


class Dropout(NamedTuple):
    """Dropout of an adapter's input: its probability and its seed.

    window: (first, rows, total) where the input is rows [first, first + rows) of one of ``total`` rows, whose mask it shares.
    """

    p: float
    seed: int
    window: tuple[int, int, int] | None = None


def dropped(
    count: int,
    p: float,
    seed: int,
    window: tuple[int, int, int] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Ascending indices, of ``count``, that dropout with probability ``p`` sets to zero: int64 [about p * count]."""
    if window is not None:
        return _in_window(count, p, seed, *window).to(device)
    generator = torch.Generator().manual_seed(seed)
    if p > _SPARSE:
        mask = torch.empty(count, dtype=torch.bool).bernoulli_(p, generator=generator)
        return mask.nonzero().squeeze(1).to(device)
    # Six standard deviations more than expected: one draw in a thousand million is too short, and is drawn on.
    draws = int(count * p + 6 * math.sqrt(count * p) + 16)
    indices = _gaps(draws, p, generator).cumsum(0) - 1
    while int(indices[-1]) < count:
        indices = torch.cat((indices, _gaps(draws, p, generator).cumsum(0) + indices[-1]))
    return indices[: int(torch.searchsorted(indices, count))].to(device)


def _in_window(count: int, p: float, seed: int, first: int, rows: int, total: int) -> Tensor:
    """The indices among those of all ``total`` rows that fall into some of them."""
    width = count // rows if rows else 0
    every = dropped(total * width, p, seed) if width else torch.zeros(0, dtype=torch.int64)
    return every[(every >= first * width) & (every < (first + rows) * width)] - first * width


def _gaps(draws: int, p: float, generator: torch.Generator) -> Tensor:
    """Steps from one dropped element to the next, 1 or more. By the logarithm of uniform numbers, which is quicker than `geometric_`."""
    u = torch.empty(draws, dtype=torch.float64).uniform_(generator=generator)
    return u.neg_().log1p_().mul_(1 / math.log1p(-p)).to(torch.int64).add_(1)


def zero_(x: Tensor, indices: Tensor) -> Tensor:
    """Set the elements of a contiguous tensor at these flat indices to zero, in place."""
    x.view(-1).index_fill_(0, indices, 0)
    return x


def drop(x: Tensor, p: float, seed: int, window: tuple[int, int, int] | None = None) -> Tensor:
    """Dropout of a whole tensor: plain form, differentiable."""
    indices = dropped(x.numel(), p, seed, window, device=x.device)
    return (x.reshape(-1).index_fill(0, indices, 0) / (1 - p)).view(x.shape)
