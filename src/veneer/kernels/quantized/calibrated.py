"""Quantizing with regard to a layer's inputs: the error of each column of a weight is made up for in the columns behind it (GPTQ).

    min over Q  ||X (Q - W)^T||^2       X [N, K]: inputs of the layer, of which the second moments X^T X [K, K] are known

Columns are rounded one after the other, those of the largest inputs first. The error of column k, divided by U_kk, times row k of U is
taken from the columns behind it, where U is the upper Cholesky factor of (X^T X + damping)^-1 (Frantar et al. 2022, arXiv 2210.17323,
algorithm 1). The scales and the values are those of the format, so whatever reads the format reads the result; only the choice of the
values differs.

Shapes: O out, K in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from veneer.kernels.quantized.four_bit import FourBit, code_of, nearest, pack
from veneer.kernels.quantized.int8 import Int8
from veneer.kernels.quantized.state import quantize
from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = ["quantize_calibrated"]

_DAMPING = 0.01
"""Added to the diagonal of the moments, as a share of its mean."""
_COLUMNS = 64
"""Columns after which all columns behind them are changed, in one product."""
_TINY = 1e-38

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Numbers in units of their scales -> (indices of the nearest values, the values)."""


@torch.no_grad()
def quantize_calibrated(
    weight_OK: Tensor, moments_KK: Tensor, format: str, *, double: bool = True, block: int = 64
) -> QuantizedWeight:
    """Quantize a weight to a format of `FORMATS`, so that the outputs on given inputs change little.

    Args:
        weight_OK: the weight.
        moments_KK: X^T X of the layer's inputs times any factor, fp32, on the device of the weight.
        format, double, block: as of `quantize`, whose scales the result has.
    """
    plain = quantize(weight_OK, format, double=double, block=block)
    if not bool(moments_KK.diagonal().any()):
        return plain
    order = moments_KK.diagonal().argsort(descending=True, stable=True)
    back = order.argsort()
    upper_KK = _upper(moments_KK[order][:, order])
    w_OK = weight_OK.float()[:, order]
    if isinstance(plain, Int8):
        return replace(plain, values=_round(w_OK, upper_KK, (plain.absmax / 127)[:, None], _to_integers)[:, back])
    assert isinstance(plain, FourBit)
    scales = plain.block_scales().repeat_interleave(block)[: weight_OK.numel()].view(weight_OK.shape)
    code = code_of(format, weight_OK.device)

    def to_values(scaled: Tensor) -> tuple[Tensor, Tensor]:
        q = nearest(scaled, format)
        return q, code[q.long()]

    q_OK = _round(w_OK, upper_KK, scales[:, order], to_values)[:, back]
    return replace(plain, packed=pack(q_OK.reshape(-1), format))


def _to_integers(scaled: Tensor) -> tuple[Tensor, Tensor]:
    values = scaled.round().clamp(-127, 127)
    return values.to(torch.int8), values


def _round(weight_OK: Tensor, upper_KK: Tensor, scales: Tensor, rounding: Rounding) -> Tensor:
    """The indices of the values that each number of a weight is rounded to; ``scales``: [O, K], or [O, 1]."""
    left_OK, scales = weight_OK.clone(), scales.clamp(min=_TINY).expand_as(weight_OK)
    found: list[Tensor] = []
    for start in range(0, weight_OK.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        columns, errors = left_OK[:, part].T.contiguous(), []
        upper = upper_KK[part, part]
        for k, (column, scale) in enumerate(zip(columns, scales[:, part].T, strict=True)):
            q, values = rounding(column / scale)
            found.append(q)
            errors.append((column - values * scale) / upper[k, k])
            columns[k + 1 :].addr_(upper[k, k + 1 :], errors[k], alpha=-1)
        left_OK[:, start + _COLUMNS :].addmm_(torch.stack(errors, 1), upper_KK[part, start + _COLUMNS :], alpha=-1)
    return torch.stack(found, 1)


def _upper(moments_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments; more damping where they have none."""
    damping = _DAMPING * moments_KK.diagonal().mean()
    for _ in range(8):
        damped = moments_KK.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
        damping = damping * 10
    return torch.eye(len(moments_KK), device=moments_KK.device)
