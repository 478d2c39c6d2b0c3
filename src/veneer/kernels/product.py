"""x W^T + b for a frozen weight, in C++ where the processor multiplies pairs of bf16 (``cpp/products.h``), by torch elsewhere.

Boundary: no gradients flow through it; callers form them themselves. Shapes: N rows, K in, O out.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.native import library

__all__ = ["linear", "longest_product"]

_STEP = 32
"""Sizes that the form in C++ takes are multiples of it."""


def linear(x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None) -> Tensor:
    """[N, O]."""
    tensors = [t for t in (x_NK, weight_OK, bias_O) if t is not None]
    (out, k), most = weight_OK.shape, longest_product()
    fits = k <= most and k % _STEP == 0 and out % _STEP == 0 and len(x_NK) > 0
    if not fits or not all(t.dtype == torch.bfloat16 and t.is_cpu and t.is_contiguous() for t in tensors):
        return F.linear(x_NK, weight_OK, bias_O)
    made, y = library(), x_NK.new_empty(len(x_NK), out)
    assert made is not None
    made.veneer_product(
        ctypes.c_void_p(x_NK.data_ptr()),
        *map(ctypes.c_long, x_NK.shape),
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (weight_OK, bias_O)),
        ctypes.c_long(out),
        ctypes.c_void_p(y.data_ptr()),
        torch.get_num_threads(),
    )
    return y


def longest_product() -> int:
    """Up to so many numbers along the inner dimension the form in C++ takes; 0: it is not there."""
    made = library()
    return 0 if made is None else _limit(made)


@lru_cache
def _limit(made: ctypes.CDLL) -> int:
    function = made.veneer_products
    function.restype = ctypes.c_long
    return int(function())
