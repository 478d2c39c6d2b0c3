"""Low-rank products of consecutive groups of rows, each with its own factors, and frozen products of stacked weights.

A mixture of experts sorts its (token, expert) pairs by expert; pairs of one expert that use one adapter are a group. All groups of
a call are one node of the autograd graph, because a node for each would cost more than its products.

Shapes: n rows, K in, O out, G groups, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNED = 16
"""Bytes to which ``grouped_mm`` wants strides aligned."""


def low_rank_by_group(
    x_nK: Tensor, sizes: Sequence[int], factors: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float]
) -> Tensor:
    """s B (A x) of each row with the factors of its group.

    Args:
        x_nK: the rows, group by group.
        sizes: number of rows of each group; their sum is n.
        factors: (A [R, K], B [O, R]) of each group, cast to the dtype of ``x_nK`` where they are used.
        scales: s of each group.

    Returns:
        [n, O] in the dtype of ``x_nK``.
    """
    flat = [tensor for pair in factors for tensor in pair]
    out: Tensor = _LowRankByGroup.apply(x_nK, tuple(sizes), tuple(scales), *flat)  # type: ignore[no-untyped-call]
    return out


class _LowRankByGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nK: Tensor, sizes: tuple[int, ...], scales: tuple[float, ...], *flat: Tensor) -> Tensor:
        dtype = x_nK.dtype
        y_nO = x_nK.new_empty(len(x_nK), flat[1].shape[0])
        lows = []
        for i, (rows, scale) in enumerate(zip(_slices(sizes), scales, strict=True)):
            a, b = flat[2 * i].to(dtype), flat[2 * i + 1].to(dtype)
            low = (x_nK[rows] @ a.T) * scale
            torch.mm(low, b.T, out=y_nO[rows])
            lows.append(low)
        ctx.save_for_backward(x_nK, *lows, *flat)
        ctx.sizes, ctx.scales = sizes, scales
        return y_nO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_nO = grads[0]
        sizes, scales = ctx.sizes, ctx.scales
        x_nK, *rest = ctx.saved_tensors
        lows, flat = rest[: len(sizes)], rest[len(sizes) :]
        wants = ctx.needs_input_grad
        grad_x = torch.empty_like(x_nK) if wants[0] else None
        found: list[Tensor | None] = []
        for i, (rows, scale) in enumerate(zip(_slices(sizes), scales, strict=True)):
            a, b = flat[2 * i], flat[2 * i + 1]
            grad = grad_nO[rows]
            grad_low = (grad @ b.to(grad.dtype)) * scale
            found.append((grad_low.T @ x_nK[rows]).to(a.dtype) if wants[3 + 2 * i] else None)
            found.append((grad.T @ lows[i]).to(b.dtype) if wants[4 + 2 * i] else None)
            if grad_x is not None:
                torch.mm(grad_low, a.to(grad.dtype), out=grad_x[rows])
        return grad_x, None, None, *found


def stacked_linear(
    x_SK: Tensor, sizes: Sequence[int], weights_EOK: Sequence[Tensor] | Callable[[int], Tensor] | Tensor
) -> Tensor:
    """x W_e^T of each row with the weight of its expert. Weights are frozen: only the input gets a gradient.

    Args:
        x_SK: the rows, expert by expert.
        sizes: number of rows of each expert; their sum is at most S. Rows beyond it are zero.
        weights_EOK: the weights [E, O, K], or a function from an expert to its weight [O, K].

    Returns:
        [S, O].
    """
    out: Tensor = _StackedLinear.apply(x_SK, tuple(sizes), weights_EOK)  # type: ignore[no-untyped-call]
    return out


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SK: Tensor, sizes: tuple[int, ...], weights: Any) -> Tensor:
        ctx.sizes, ctx.weights = sizes, weights
        pieces = [F.linear(x_SK[rows], _weight(weights, e)) for e, rows in _hit(sizes)]
        left = len(x_SK) - sum(sizes)
        if left or not pieces:
            pieces.append(x_SK.new_zeros(left, _weight(weights, 0).shape[0]))
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_SO = grads[0]
        pieces = [grad_SO[rows] @ _weight(ctx.weights, e) for e, rows in _hit(ctx.sizes)]
        left = len(grad_SO) - sum(ctx.sizes)
        if left or not pieces:
            pieces.append(grad_SO.new_zeros(left, _weight(ctx.weights, 0).shape[1]))
        return torch.cat(pieces), None, None


def takes_grouped_mm(x_SK: Tensor, weight_EOK: Tensor) -> bool:
    """True if torch's ``grouped_mm`` computes this product: precision, alignment, device."""
    if not hasattr(F, "grouped_mm") or x_SK.dtype != weight_EOK.dtype or x_SK.is_meta or type(x_SK) is not Tensor:
        return False
    if weight_EOK.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    size = weight_EOK.element_size()
    strides = [s for s in (*weight_EOK.stride(), x_SK.shape[1]) if s != 1]
    if any(s * size % _ALIGNED for s in strides) or weight_EOK.data_ptr() % _ALIGNED:
        return False
    return weight_EOK.device.type == "cpu" or (
        weight_EOK.device.type == "cuda" and torch.cuda.get_device_capability(weight_EOK.device) >= (8, 0)
    )


def _weight(weights: Any, expert: int) -> Tensor:
    weight: Tensor = weights(expert) if callable(weights) else weights[expert]
    return weight


def _slices(sizes: Sequence[int]) -> list[slice]:
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return found


def _hit(sizes: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert with rows."""
    return [(e, rows) for e, rows in enumerate(_slices(sizes)) if rows.stop > rows.start]
