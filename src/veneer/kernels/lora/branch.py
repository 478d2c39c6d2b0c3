"""The parts of a fast adapted linear call: an adapter's factors at a layer, its tokens, and the contract of a branch.

A branch is one adapter's part in a call (`SingleBranch`), or that of several adapters (`GroupedBranch`, `NativeBranch`). The base product
and the gradient of the input belong to the call (`adapted_linear`); branches work on them in place.
Shapes: N tokens, n an adapter's tokens, K in, O out, R rank (of one layer, or of all layers behind each other).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.lora.dropout import Dropout, places
from veneer.kernels.lora.magnitude_scale import apply_scale, column_dots
from veneer.kernels.quantized.weight import QuantizedWeight

Tokens = Tensor | slice | None
"""An adapter's tokens: LongTensor [n], a slice, or None for all."""
Layer = tuple[Tensor, Tensor | None]
"""A frozen weight [O, K] and bias [O] or None. A weight that is stored as [K, O] is a view with its dimensions exchanged."""
StoredLayer = tuple[Tensor | QuantizedWeight, Tensor | None]
"""A layer as its module holds it: the weight may be quantized."""
Gradients = list[Tensor | None]
_WEAK = 1e-20
"""Magnitude scales below this cannot be divided out of an output again."""
_WEAKEST = 32
"""Outputs that are computed again on a device where looking for weak ones would cost more."""


class PreparedFactors(NamedTuple):
    """Factors as a layer computes with them: A, s S B in the compute dtype, and S [O] or None."""

    a_RK: Tensor
    b_OR: Tensor
    s_O: Tensor | None


@dataclass(eq=False)
class Factors:
    """One adapter at one layer.

    a [R, K], b [O, R]: masters. scale: s. magnitude, norm [O]: m and ||W + s B A||_row, or None for LoRA. dropout: None without.
    prepared: the result of `prepare`, if it is known.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    dropout: Dropout | None = None
    prepared: PreparedFactors | None = None

    @property
    def masters(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors that may require gradients."""
        return (self.a, self.b, self.magnitude)

    @property
    def kept(self) -> float:
        """1 - p: the part of the input that dropout leaves."""
        return 1.0 if self.dropout is None else 1 - self.dropout.p

    def dropped(self, count: int, device: torch.device) -> Tensor | None:
        """The `places` that dropout sets to zero in an input of ``count`` numbers; None without dropout."""
        return None if self.dropout is None else places(count, self.dropout, device)

    def magnitude_scale(self) -> Tensor | None:
        """S [O] in the norm's dtype."""
        if self.prepared is not None:
            return self.prepared.s_O
        if self.magnitude is None or self.norm is None:
            return None
        return self.magnitude.detach().to(self.norm.dtype) / self.norm.clamp_min(torch.finfo(self.norm.dtype).tiny)

    def prepare(self, dtype: torch.dtype) -> PreparedFactors:
        """The factors in the compute dtype. The scale and S are multiplied into B while it is wide."""
        if self.prepared is not None:
            return self.prepared
        s = self.magnitude_scale()
        return PreparedFactors(self.a.detach().to(dtype), self.scaled_b(s).to(dtype), s)

    def scaled_b(self, s_O: Tensor | None) -> Tensor:
        """s S B in the master's dtype."""
        b = self.b.detach()
        return b * self.scale if s_O is None else b * (s_O * self.scale).unsqueeze(1)


class AdapterPart:
    """One adapter in a call.

    weight: w, a float or a tensor [n]. factors: one for each layer, None where it does not act (not all of them). parts: the others, with
    their layers. scales: S by layer.
    """

    def __init__(self, tokens: Tokens, weight: float | Tensor, factors: Sequence[Factors | None]) -> None:
        self.tokens = tokens
        self.weight = weight
        self.factors = factors
        self.parts = [(h, f) for h, f in enumerate(factors) if f is not None]
        self.scales = {h: s.contiguous() for h, f in self.parts if (s := f.magnitude_scale()) is not None}
        self.drops = any(f.dropout is not None for _, f in self.parts)

    def apply_magnitude_(self, h: int, t_NO: Tensor, bias_O: Tensor | None) -> None:
        """S (t - b) + b on the adapter's tokens, in place."""
        if (s := self.scales.get(h)) is None:
            return
        part = take(t_NO, self.tokens)
        if bias_O is None:
            apply_scale(part, s, out=part)
        else:
            part.addcmul_(part - bias_O, (s - 1).to(part.dtype))
        put_(t_NO, self.tokens, part)


class Branch:
    """One part of a call beside its base products."""

    masters: list[Tensor | None]
    scaled: Collection[int]
    """Layers where a magnitude acts."""
    applies_magnitude = False
    """True if `run_` multiplies by S itself, so that `apply_magnitude_` is for backward only."""

    def takes_base_product(self, tokens: int) -> bool:
        """True if, with so many tokens, `run_` and `gradients_` take the layers' base products too and overwrite their outputs."""
        return False

    def covers_all_tokens(self, h: int, tokens: int) -> bool:
        """True if every token has an adapter of this branch at layer h, so that its base product may be taken in C++."""
        return False

    def full_magnitude_scale(self, h: int) -> Tensor | None:
        """S [O] at layer h, if one S acts on every token."""
        return None

    def apply_magnitude_(self, h: int, t_NO: Tensor, bias_O: Tensor | None) -> None:
        """C (t - b) + b on the branch's tokens, in place."""
        raise AssertionError

    def run_(self, x_NK: Tensor, y_NO: Sequence[Tensor]) -> list[Tensor | None]:
        """Add the low-rank products to the layers' outputs; returns the tensors that `gradients_` needs."""
        raise AssertionError

    def gradients_(self, back: Backward, kept: Sequence[Tensor | None]) -> Gradients:
        """Gradients of the masters, three a layer; the branch's part of the input's gradient is added in place."""
        raise AssertionError


@dataclass(eq=False)
class Backward:
    """The tensors of a call that its branches need in backward.

    x_NK: the input, or None where no master is trained. y_NO: outputs of layers with a magnitude. g_NO: gradients of the outputs, None for
    outputs that were not used. dx_NK: the sum of the input's gradient, or None if it is not needed.
    """

    layers: tuple[Layer, ...]
    x_NK: Tensor | None
    y_NO: list[Tensor | None]
    g_NO: list[Tensor | None]
    dx_NK: Tensor | None


def take(t_N: Tensor, tokens: Tokens) -> Tensor:
    """An adapter's tokens: a view where that is possible."""
    if tokens is None:
        return t_N
    return t_N[tokens] if isinstance(tokens, slice) else t_N.index_select(0, tokens)


def put_(t_N: Tensor, tokens: Tokens, part: Tensor) -> None:
    """Write back what `take` gave, if it was not a view."""
    if isinstance(tokens, Tensor):
        t_N.index_copy_(0, tokens, part)


class Reduction(NamedTuple):
    """The operands of one magnitude's gradient: layer, factors, S, and g, y, x, x A^T (None: not kept) on its adapter's tokens."""

    layer: Layer
    factors: Factors
    s_O: Tensor
    g_nO: Tensor
    y_nO: Tensor
    x_nK: Tensor
    xa_nR: Tensor | None


def magnitude_gradient(part: Reduction, dots_O: Tensor | None = None) -> Tensor:
    """dm = sum_t g z / norm, [O], with z = (y - b) / S. ``dots_O``: sum_t g (y - b), if it is known."""
    if dots_O is None:
        dots_O = column_dots(part.g_nO, part.y_nO, part.layer[1])
    m = part.factors.magnitude
    assert m is not None
    dm = dots_O.to(part.s_O.dtype) / m.detach().to(part.s_O.dtype)
    if not dm.is_cpu:
        # Looking for weak ones would make the host wait once a layer, so the smallest few are computed again whatever they are.
        # Of more than these the gradient stays NaN, which ends the job with an error.
        weak = part.s_O.abs().topk(min(_WEAKEST, len(dm)), largest=False).indices
        dm[weak] = torch.where(part.s_O[weak].abs() < _WEAK, _weak_gradients(part, weak), dm[weak])
    elif not math.isfinite(float(dm.sum())):  # one sum finds any, in a third of the time
        weak = (part.s_O.abs() < _WEAK).nonzero().squeeze(1)
        if len(weak):
            dm[weak] = _weak_gradients(part, weak)
    return dm.to(m.dtype)


def _weak_gradients(part: Reduction, weak: Tensor) -> Tensor:
    """Gradients of magnitudes near zero, where y does not determine z: these few outputs are computed again."""
    f, weight = part.factors, part.layer[0]
    assert f.norm is not None
    x = part.x_nK
    xa = x @ f.a.detach().to(x.dtype).T if part.xa_nR is None else part.xa_nR
    z = x @ weight[weak].T + xa @ (f.b.detach()[weak] * f.scale).to(x.dtype).T
    norm = f.norm[weak].clamp_min(torch.finfo(f.norm.dtype).tiny)
    return column_dots(part.g_nO[:, weak], z).to(norm.dtype) / norm
