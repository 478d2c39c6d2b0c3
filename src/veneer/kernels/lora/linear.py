"""Linear layers with adapters, forward and backward by hand: the fast form of `adapted` (``reference.py``).

One call takes every layer that reads the same input x (q, k, v; gate, up): layers h with frozen W_h and b_h, and adapters j that each
act on some of the tokens (rows, tokens) with weight w_tj:

    forward     y_h = C (x W_h^T) + b_h + sum_j w_j (x A_hj^T) (s S B)_hj^T
    backward    dx  = sum_h (C g_h) W_h + sum_j G_j [A_1j; A_2j; ...],       G_j = w_j [g_1 (s S B)_1j | g_2 (s S B)_2j | ...]

with S = m / norm for DoRA and 1 for LoRA, C = S on the tokens of a DoRA adapter and 1 elsewhere; gradients of A, B and m stand where they
are taken (``single.py``, ``grouped.py``, ``native.py``). What autograd would do in many passes over [tokens, out] happens inside
the matrix products: the low-rank branch is added into the base product in place, the gradients of x from all layers land in one buffer,
and the products with A are taken for all layers at once. Kept for backward: x, once; x A^T, which costs less to keep ([tokens, rank])
than to compute again; and for DoRA the output. Without its bias that is z S, so that m's gradient needs no second base product. The base
product takes the bias along and C acts as y + (C - 1) (y - b), so that C = 1 changes no bit. Where W has fewer columns than there
are tokens, S multiplies W's rows (a temporary) and not the outputs.

A quantized weight is dequantized once in the forward, for products and norms alike, and again in the backward; the dense one is not kept
between them. Branches get its shape (`outlined`).

Boundary: the tokens of a DoRA adapter belong to no other adapter and its weight is 1; the norm is a constant. Whatever else there is
takes the plain path; the caller decides.
Shapes: N tokens, K in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.frozen_linear import linear
from veneer.kernels.lora.branch import Backward, Branch, Factors, Layer, PreparedFactors, StoredLayer
from veneer.kernels.lora.grouped import GroupedBranch, PaddedFactors, TokenGrid, pad_factors
from veneer.kernels.lora.magnitude_scale import scale_rows
from veneer.kernels.lora.native import AdapterSpan, NativeBranch, fits
from veneer.kernels.lora.single import SingleBranch
from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = [
    "AdapterSpan",
    "Branch",
    "Factors",
    "GroupedBranch",
    "Layer",
    "NativeBranch",
    "PaddedFactors",
    "PreparedFactors",
    "SingleBranch",
    "StoredLayer",
    "TokenGrid",
    "adapted_linear",
    "fits",
    "opened",
    "outlined",
    "pad_factors",
]


def opened(layers: Sequence[StoredLayer], dtype: torch.dtype) -> Sequence[Layer]:
    """The layers with dense weights: quantized ones are dequantized, for one call."""
    if not any(isinstance(weight, QuantizedWeight) for weight, _ in layers):
        return layers  # type: ignore[return-value]
    return [(w.dequantize(dtype=dtype) if isinstance(w, QuantizedWeight) else w, bias) for w, bias in layers]


def outlined(layers: Sequence[StoredLayer], dense: Sequence[Layer]) -> Sequence[Layer]:
    """The dense layers, with the shape alone of weights that were dequantized for this call."""
    if layers is dense:
        return dense
    pairs = zip(layers, dense, strict=True)
    return [(w.to("meta") if isinstance(kept, QuantizedWeight) else w, bias) for (kept, _), (w, bias) in pairs]


def adapted_linear(
    x: Tensor, layers: Sequence[StoredLayer], branches: Sequence[Branch], dense: Sequence[Layer] | None = None
) -> tuple[Tensor, ...]:
    """Outputs [..., O_h] of the ``layers`` on x [..., K], adapters included.

    Gradients reach x and the masters of the branches, these in their own dtype. The compute dtype is x's, which the layers share.
    ``dense``: what `opened` makes of the layers, if the caller has it.
    """
    dense = opened(layers, x.dtype) if dense is None else dense
    if not torch.is_grad_enabled():
        return tuple(_forward(_LinearCall(tuple(layers), tuple(branches), trains=False), dense, x)[0])
    masters = [master for branch in branches for master in branch.masters]
    trains = any(m is not None and m.requires_grad for m in masters)
    call: Any = AdaptedLinear.apply
    made = _LinearCall(tuple(layers), tuple(branches), trains)
    return call(made, dense, x, *masters)  # type: ignore[no-any-return]


class _LinearCall:
    """The layers and branches of one call, and how many tensors each branch saved."""

    def __init__(self, layers: tuple[StoredLayer, ...], branches: tuple[Branch, ...], trains: bool) -> None:
        self.layers = layers
        self.branches = branches
        self.trains = trains
        self.has_magnitude = [any(h in branch.scaled for branch in branches) for h in range(len(layers))]
        self.sizes: list[int] = []
        self.base_in_branch = False
        """True if the only branch takes the base products too."""

    def scales_weight(self, h: int, tokens: int) -> Tensor | None:
        """S, if it is cheaper to multiply W's rows by it: one DoRA adapter has all the tokens, and they outnumber W's columns."""
        if len(self.branches) > 1 or tokens <= self.layers[h][0].shape[1]:
            return None
        return self.branches[0].full_magnitude_scale(h)

    def apply_magnitude_(self, h: int, t_NO: Tensor) -> None:
        """C t, in place."""
        for branch in self.branches:
            branch.apply_magnitude_(h, t_NO, None)


class AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _LinearCall, dense: Sequence[Layer], x: Tensor, *masters: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, kept = _forward(call, dense, x)
        kept_outputs = [y if call.trains and call.has_magnitude[h] else None for h, y in enumerate(outputs)]
        ctx.call, ctx.shape = call, x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if call.trains else None, *kept_outputs, *kept, *masters)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _LinearCall = ctx.call
        x, *saved = ctx.saved_tensors
        g_NO = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        tokens = next((len(g) for g in g_NO if g is not None), 0)
        layers = opened(call.layers, next((g.dtype for g in g_NO if g is not None), torch.float32))
        dx_NK = _base_gradient(call, layers, g_NO, tokens) if ctx.needs_input_grad[2] and tokens else None
        y_NO = [None if t is None else t.view(-1, t.shape[-1]) for t in saved[: len(g_NO)]]
        x_NK = None if x is None else x.reshape(-1, x.shape[-1])
        back = Backward(tuple(layers), x_NK, y_NO, g_NO, dx_NK)
        masters: list[Tensor | None] = []
        at = len(g_NO)
        for branch, size in zip(call.branches, call.sizes, strict=True):
            masters += branch.gradients_(back, saved[at : at + size])
            at += size
        return (None, None, None if dx_NK is None else dx_NK.view(ctx.shape), *masters)


def _forward(call: _LinearCall, layers: Sequence[Layer], x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs, and the tensors that the branches need in backward."""
    x_NK = x.reshape(-1, x.shape[-1])
    # Outputs are not views, so that a model may go on in place; where that spoils what backward needs, autograd says so.
    call.base_in_branch = len(call.branches) == 1 and call.branches[0].takes_base_product(len(x_NK))
    outputs = [_base(call, layers, h, x, len(x_NK)) for h in range(len(layers))]
    y_NO = [y.view(-1, y.shape[-1]) for y in outputs]
    kept: list[Tensor | None] = []
    for branch in call.branches:
        saved = branch.run_(x_NK, y_NO)
        call.sizes.append(len(saved))
        kept += saved
    return outputs, kept


def _base(call: _LinearCall, layers: Sequence[Layer], h: int, x: Tensor, tokens: int) -> Tensor:
    """C (x W^T) + b, [..., O]."""
    weight, bias = layers[h]
    if call.base_in_branch:
        return x.new_empty(*x.shape[:-1], len(weight))
    if not any(h in branch.scaled for branch in call.branches if not branch.applies_magnitude):
        if not any(branch.covers_all_tokens(h, tokens) for branch in call.branches):
            return _product(x, weight, bias)
        y = linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], len(weight))
    s = call.scales_weight(h, tokens)
    if s is not None:
        return F.linear(x, scale_rows(weight, s), bias)
    y = _product(x, weight, bias)
    for branch in call.branches:
        if not branch.applies_magnitude:
            branch.apply_magnitude_(h, y.view(-1, y.shape[-1]), bias)
    return y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by the layer's own call, so that tokens without an adapter keep their bits: Conv1D stores [K, O] and takes addmm."""
    if weight.is_contiguous() or bias is None:
        return F.linear(x, weight, bias)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.T).view(*x.shape[:-1], len(weight))


def _base_gradient(call: _LinearCall, layers: Sequence[Layer], g_NO: list[Tensor | None], tokens: int) -> Tensor:
    """sum_h (C g_h) W_h, [N, K], all in one buffer."""
    if call.base_in_branch:
        return layers[0][0].new_empty(tokens, layers[0][0].shape[1])
    dx: Tensor | None = None
    for h, g in enumerate(g_NO):
        if g is None:
            continue
        weight = layers[h][0]
        if call.has_magnitude[h]:
            s = call.scales_weight(h, tokens)
            if s is not None:
                weight = scale_rows(weight, s)
            else:
                g = g.clone()
                call.apply_magnitude_(h, g)
        dx = g @ weight if dx is None else dx.addmm_(g, weight)
    assert dx is not None
    return dx
