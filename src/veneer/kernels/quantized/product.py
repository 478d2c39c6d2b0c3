"""x W^T + b for a quantized weight: W is dequantized in the forward and again in the backward, and kept in neither."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = ["quantized_linear"]


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x W^T + b, [..., O], in the data type of x. Gradients reach x and b."""
    if not torch.is_grad_enabled():
        return F.linear(x, weight.dequantize(dtype=x.dtype), bias)
    call: Any = QuantizedLinearFunction.apply
    return call(x, weight, bias)  # type: ignore[no-any-return]


class QuantizedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(dtype=x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, _, wants_bias = ctx.needs_input_grad
        dx = g @ ctx.weight.dequantize(dtype=g.dtype) if wants_x else None
        return dx, None, g.reshape(-1, g.shape[-1]).sum(0) if wants_bias else None
