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

Initialiser = Callable[[Tensor, Geometry, torch.Generator], Tensor]


def kaiming_uniform(a: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
    """A ~ U(-1/sqrt(k), 1/sqrt(k)) for k inputs, the default of nn.Linear."""
    bound = 1 / math.sqrt(geometry.fan_in)
    return a.uniform_(-bound, bound, generator=generator)


def gaussian(a: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
    """A ~ N(0, 1/r^2)."""
    return a.normal_(0, 1 / len(a), generator=generator)


INITIALISERS: dict[str, Initialiser] = {"kaiming_uniform": kaiming_uniform, "gaussian": gaussian}


def initial_factors(
    name: str, geometry: Geometry, r: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(A, B) for one site. ``generator`` belongs to the adapter: no global random state is read."""
    a, b = torch.zeros(geometry.shape_a(r), dtype=dtype), torch.zeros(geometry.shape_b(r), dtype=dtype)
    if geometry.kind == "embedding":
        return a, b.normal_(generator=generator)
    return INITIALISERS[name](a, geometry, generator), b
