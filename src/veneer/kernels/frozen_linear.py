"""x W^T + b for a frozen weight: in C++ on processors that multiply pairs of bf16 (``cpp/products.h``), by torch elsewhere.

No gradients flow through it; callers compute them. Shapes: N rows, K in, O out.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.cpp_library import function, library

__all__ = ["linear", "longest_product"]

_LONG, _POINTER = ctypes.c_long, ctypes.c_void_p
_ARGUMENTS = (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _POINTER, ctypes.c_int)
_STEP = 32
"""K and O must be multiples of it for the form in C++."""


def linear(x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None) -> Tensor:
    """Compute x W^T + b, [N, O]."""
    (out, k), rows, made = weight_OK.shape, len(x_NK), library()
    if made is None or not _fits(made, x_NK, weight_OK, bias_O) or k % _STEP or out % _STEP or not rows:
        return F.linear(x_NK, weight_OK, bias_O)
    y = x_NK.new_empty(rows, out)
    bias = None if bias_O is None else bias_O.data_ptr()
    product = function(made, "veneer_product", _ARGUMENTS)
    product(x_NK.data_ptr(), rows, k, weight_OK.data_ptr(), bias, out, y.data_ptr(), torch.get_num_threads())
    return y


def _fits(made: ctypes.CDLL, x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None) -> bool:
    kind = torch.bfloat16
    plain = x_NK.dtype == weight_OK.dtype == kind and x_NK.is_cpu and weight_OK.is_cpu
    laid = plain and x_NK.is_contiguous() and weight_OK.is_contiguous() and weight_OK.shape[1] <= _limit(made)
    return laid and (bias_O is None or (bias_O.dtype == kind and bias_O.is_contiguous()))


def longest_product() -> int:
    """Return the longest inner dimension that the form in C++ accepts; 0 if it is not in use."""
    made = library()
    return 0 if made is None else _limit(made)


@lru_cache
def _limit(made: ctypes.CDLL) -> int:
    return int(function(made, "veneer_products", (), ctypes.c_long)())
