"""Initialisers of an adapter's factors: one function each, in a table.

Every initialiser makes the first change exactly zero: for layers A is random and B zero; for an embedding, where A is looked up by
token, A is zero and B normal (LoRA, arXiv 2106.09685, section 4.1, and its reference code).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import Geometry

Initialiser = Callable[[Geometry, int, torch.Generator, torch.dtype], tuple[Tensor, Tensor]]


def kaiming_uniform(
    geometry: Geometry, r: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A ~ U(-1/sqrt(k), 1/sqrt(k)) for k inputs, the default of nn.Linear; B = 0."""
    bound = 1 / math.sqrt(geometry.fan_in)
    a = torch.empty(geometry.shape_a(r), dtype=dtype).uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(geometry.shape_b(r), dtype=dtype)


def gaussian(geometry: Geometry, r: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1/r^2); B = 0."""
    a = torch.empty(geometry.shape_a(r), dtype=dtype).normal_(0, 1 / r, generator=generator)
    return a, torch.zeros(geometry.shape_b(r), dtype=dtype)


INITIALISERS: dict[str, Initialiser] = {"kaiming_uniform": kaiming_uniform, "gaussian": gaussian}


def initial_factors(
    name: str, geometry: Geometry, r: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(A, B) for one site. ``generator`` is the adapter's own: no global random state is read."""
    if geometry.kind == "embedding":
        a = torch.zeros(geometry.shape_a(r), dtype=dtype)
        return a, torch.empty(geometry.shape_b(r), dtype=dtype).normal_(generator=generator)
    return INITIALISERS[name](geometry, r, generator, dtype)
