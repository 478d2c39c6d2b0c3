"""DoRA's magnitude scale S [out]: multiplying by it, and the reduction in the gradient of its magnitude.

    apply_scale     t S, as t + t (S - 1): S = 1 changes no bit, and what is rounded before the sum is the small difference
    column_dots     sum_t a_to (b_to - c_o), [O]

Shapes: T tokens, O out, K in.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_scale", "column_dots", "scale_rows"]


def apply_scale(t_TO: Tensor, s_O: Tensor, out: Tensor | None = None) -> Tensor:
    """t S over the last dimension, in t's dtype."""
    return torch.addcmul(t_TO, t_TO, (s_O - 1).to(t_TO.dtype), out=out)


def scale_rows(weight_OK: Tensor, s_O: Tensor) -> Tensor:
    """S_o W_ok: a new weight."""
    return torch.addcmul(weight_OK, weight_OK, (s_O - 1).to(weight_OK.dtype).unsqueeze(1))


def column_dots(a_TO: Tensor, b_TO: Tensor, shift_O: Tensor | None = None) -> Tensor:
    """sum_t a (b - shift), [O], summed in fp32 at least."""
    product = a_TO * (b_TO if shift_O is None else b_TO - shift_O)
    if product.dtype in (torch.float32, torch.float64):
        return product.sum(0)
    # A product with ones sums in fp32 inside, and faster than sum() does for narrow types on a CPU.
    return (product.new_ones(1, len(product)) @ product)[0]
