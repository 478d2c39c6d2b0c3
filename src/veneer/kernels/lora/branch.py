"""What the fused adapted linear is put together from: an adapter's factors at a layer, the cells it acts on, and what a branch must do.

A branch is one adapter's part in a call (`adapted_share`), or that of several adapters with few cells each (`adapted_bundle`). Base
product and gradient of the input belong to the call (`adapted_linear`); branches work on them in place.
Shapes: N cells, n an adapter's cells, K in, O out, R rank (of one layer, or of all layers behind each other).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from veneer.kernels.lora.dropout import dropped
from veneer.kernels.lora.magnitude_scale import column_dots, regain

Rows = Tensor | slice | None
Layer = tuple[Tensor, Tensor | None]
"""A frozen weight [O, K] and bias [O] or None. A weight that is stored as [K, O] is a view with its dimensions exchanged."""
Gradients = list[Tensor | None]
_WEAK = 1e-20
"""Gains below this cannot be divided out of an output again."""


class Folded(NamedTuple):
    """Factors as a layer computes with them: A, s S B in the compute dtype, and S [O] or None."""

    a_RK: Tensor
    b_OR: Tensor
    gain_O: Tensor | None


@dataclass(eq=False)
class Factors:
    """One adapter at one layer.

    a [R, K], b [O, R]: masters. scale: s. magnitude, norm [O]: m and ||W + s B A||_row, or None for LoRA. dropout: (p, seed) or None.
    folded: what `fold` would make of them, where that is known already.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    dropout: tuple[float, int] | None = None
    folded: Folded | None = None

    @property
    def masters(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What may require gradients."""
        return (self.a, self.b, self.magnitude)

    @property
    def kept(self) -> float:
        """1 - p: the part of the input that dropout leaves."""
        return 1.0 if self.dropout is None else 1 - self.dropout[0]

    def places(self, count: int, device: torch.device) -> Tensor | None:
        """Where dropout sets an input of so many numbers to zero: ascending, in as few bytes as do; None without dropout."""
        if self.dropout is None:
            return None
        places = dropped(count, *self.dropout, device)
        return places.to(torch.int32) if count < 2**31 else places

    def gain(self) -> Tensor | None:
        """S [O] in the norm's dtype."""
        if self.folded is not None:
            return self.folded.gain_O
        if self.magnitude is None or self.norm is None:
            return None
        return self.magnitude.detach().to(self.norm.dtype) / self.norm.clamp_min(torch.finfo(self.norm.dtype).tiny)

    def fold(self, dtype: torch.dtype) -> Folded:
        """The factors as they are computed with. The scale and the gain go into B while it is wide."""
        if self.folded is not None:
            return self.folded
        gain = self.gain()
        b = self.b.detach()
        b = b * self.scale if gain is None else b * (gain * self.scale).unsqueeze(1)
        return Folded(self.a.detach().to(dtype), b.to(dtype), gain)


class Branch(Protocol):
    """One part of a call beside its base products."""

    masters: list[Tensor | None]
    scales: bool
    """Whether `run_` multiplies by the gain itself, so that `regain_` is for backward only."""

    def whole(self, cells: int) -> bool:
        """Whether, with so many cells, `run_` and `gradients_` take the layers' own products too, and write over what stands there."""
        ...

    def covers(self, h: int, cells: int) -> bool:
        """Whether each of so many cells has an adapter of this branch at layer h, and its product may be one in C++."""
        ...

    def gained(self, h: int) -> bool:
        """Whether a gain acts at layer h."""
        ...

    def whole_gain(self, h: int) -> Tensor | None:
        """S [O] at layer h, where one gain acts on every cell."""
        ...

    def regain_(self, h: int, t_NO: Tensor, bias_O: Tensor | None) -> None:
        """C (t - b) + b on the branch's cells, in place."""
        ...

    def run_(self, x_NK: Tensor, y_NO: Sequence[Tensor]) -> list[Tensor | None]:
        """Add the low-rank products to the layers' outputs; returns what `gradients_` needs of them again."""
        ...

    def gradients_(self, back: Backward, kept: Sequence[Tensor | None]) -> Gradients:
        """Gradients of the masters; the branch's part of the input's gradient is added in place."""
        ...


@dataclass(eq=False)
class Backward:
    """What a call hands to its branches in backward.

    x_NK: the input, or None where no master is trained. y_NO: outputs of layers with a gain. g_NO: gradients of the outputs, None for
    outputs that were not used. dx_NK: where the input's gradient is summed, or None if nobody wants it.
    """

    layers: tuple[Layer, ...]
    x_NK: Tensor | None
    y_NO: list[Tensor | None]
    g_NO: list[Tensor | None]
    dx_NK: Tensor | None


def take(t_N: Tensor, rows: Rows) -> Tensor:
    """An adapter's cells: a view where that is possible."""
    if rows is None:
        return t_N
    return t_N[rows] if isinstance(rows, slice) else t_N.index_select(0, rows)


def put_(t_N: Tensor, rows: Rows, part: Tensor) -> None:
    """Write back what `take` gave, if it was no view."""
    if isinstance(rows, Tensor):
        t_N.index_copy_(0, rows, part)


def regain_cells_(t_NO: Tensor, rows: Rows, gain_O: Tensor, bias_O: Tensor | None) -> None:
    """S (t - b) + b on an adapter's cells, in place."""
    part = take(t_NO, rows)
    if bias_O is None:
        regain(part, gain_O, out=part)
    else:
        part.addcmul_(part - bias_O, (gain_O - 1).to(part.dtype))
    put_(t_NO, rows, part)


class Reduction(NamedTuple):
    """What one magnitude's gradient is made from: its layer, factors and S, and g, y, x, x A^T (None: not kept) on its adapter's cells."""

    layer: Layer
    factors: Factors
    gain_O: Tensor
    g_nO: Tensor
    y_nO: Tensor
    x_nK: Tensor
    xa_nR: Tensor | None


def magnitude_gradients(parts: Sequence[Reduction]) -> list[Tensor]:
    """dm = sum_t g z / norm, [O], with z = (y - b) / S, for parts of the same cells."""
    if not parts:
        return []
    dots = column_dots([(part.g_nO, part.y_nO, part.layer[1]) for part in parts])
    return [by_magnitude(part, dot) for part, dot in zip(parts, dots, strict=True)]


def by_magnitude(part: Reduction, dots_O: Tensor) -> Tensor:
    """dm from sum_t g (y - b), [O]."""
    m = part.factors.magnitude
    assert m is not None
    dm = dots_O.to(part.gain_O.dtype) / m.detach().to(part.gain_O.dtype)
    if not math.isfinite(float(dm.sum())):  # a sum tells as much as a look at each, in a third of the time
        weak = (part.gain_O.abs() < _WEAK).nonzero().squeeze(1)
        if len(weak):
            dm[weak] = _weak_gradients(part, weak)
    return dm.to(m.dtype)


def _weak_gradients(part: Reduction, weak: Tensor) -> Tensor:
    """Where m is zero it took z with it: these few outputs are computed again."""
    f, weight = part.factors, part.layer[0]
    assert f.norm is not None
    x = part.x_nK
    xa = x @ f.a.detach().to(x.dtype).T if part.xa_nR is None else part.xa_nR
    z = x @ weight[weak].T + xa @ (f.b.detach()[weak] * f.scale).to(x.dtype).T
    norm = f.norm[weak].clamp_min(torch.finfo(f.norm.dtype).tiny)
    return column_dots([(part.g_nO[:, weak], z, None)])[0].to(norm.dtype) / norm
