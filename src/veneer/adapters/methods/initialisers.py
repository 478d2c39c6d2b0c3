"""Initialisers of an adapter's factors: one function each, in a table.

Random initialisers make the first change exactly zero: for layers A is random and B zero; for an embedding, where A is looked up by
token, A is zero and B normal (LoRA, arXiv 2106.09685, section 4.1, and its reference code).

PiSSA and OLoRA start from factors A_0, B_0 of the base weight itself, and train  W - s B_0 A_0 + s B A.  The base is shared and stays as it
is, so the adapter is that change: [A; A_0] and [B, -B_0], whose second half is held while the first is trained. Its rank is 2 r.
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


MOVING = ("pissa", "olora")
"""Initialisers that start from a part of the base weight."""


def first_factors(name: str, weight_OK: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A_0 [r, in], B_0 [out, r]) from which training starts.

    pissa: s B_0 A_0 is the best approximation of rank r (arXiv 2404.02948, eq. 2). olora: B_0 A_0 = Q_r R_r of W = Q R (2406.01775).
    """
    if name == "olora":
        q, upper = torch.linalg.qr(weight_OK)
        return upper[:r], q[:, :r]
    left, values, right = torch.linalg.svd(weight_OK, full_matrices=False)
    root = (values[:r] / scale).sqrt()
    return root.unsqueeze(1) * right[:r], left[:, :r] * root


INITIALISERS: dict[str, Initialiser] = {"kaiming_uniform": kaiming_uniform, "gaussian": gaussian}


def initial_factors(
    name: str, geometry: Geometry, r: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(A, B) for one site. ``generator`` belongs to the adapter: no global random state is read."""
    a, b = torch.zeros(geometry.shape_a(r), dtype=dtype), torch.zeros(geometry.shape_b(r), dtype=dtype)
    if geometry.kind == "embedding":
        return a, b.normal_(generator=generator)
    return INITIALISERS[name](a, geometry, generator), b
