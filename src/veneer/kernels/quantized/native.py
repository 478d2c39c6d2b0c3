"""Quantized weights as the kernels in C++ take them (``cpp/quantized.h``), and dequantizing in C++, on a CPU.

The 16 products of a four-bit block's code and absmax are computed and rounded once; its numbers are looked up among them. The result has
the bits of the forms in torch (`four_bit.py`, `int8.py`), which run where there is no library.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from veneer.kernels.cpp_library import KINDS, function, library
from veneer.kernels.tuning import ONE_THREAD_NUMBERS

__all__ = ["DENSE", "EIGHT_BITS", "FOUR_BITS", "WeightView", "dequantize_rows", "view_of"]

DENSE, FOUR_BITS, EIGHT_BITS = range(3)
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p
_ROUNDINGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class WeightView(ctypes.Structure):
    """``Weight`` in ``cpp/quantized.h``: addresses in tensors that others keep alive."""

    _fields_ = [
        *((name, _LONG) for name in ("format", "columns", "block", "rounding")),
        *((name, _POINTER) for name in ("data", "absmax", "map", "outer")),
        *((name, _FLOAT) for name in ("offset", "scale")),
        ("code", _POINTER),
    ]


def view_of(
    format: int,
    columns: int,
    data: Tensor,
    absmax: Tensor | None = None,
    *,
    code: Tensor | None = None,
    block: int = 0,
    rounding: torch.dtype = torch.float32,
    double: tuple[Tensor, Tensor, float] | None = None,
    scale: float = 1.0,
) -> WeightView | None:
    """Describe a weight; None where the kernels do not accept its tensors.

    Args:
        format: of its numbers.
        columns: inputs of a row.
        data, absmax, code: as `FourBit` and `Int8` have them.
        block: size of a block of four-bit numbers.
        rounding: the data type that four-bit numbers are rounded to first.
        double: the map of quantized absmax, their absmax, and their offset; None without double quantization.
        scale: of eight-bit numbers, beside their absmax.
    """
    mapped, outer, offset = (None, None, 0.0) if double is None else double
    tensors = [t for t in (data, absmax, code, mapped, outer) if t is not None]
    if rounding not in _ROUNDINGS or not all(t.is_cpu and t.is_contiguous() for t in tensors):
        return None
    at = [None if t is None else t.data_ptr() for t in (data, absmax, mapped, outer, code)]
    return WeightView(format, columns, block, _ROUNDINGS[rounding], *at[:4], offset, scale, at[4])


def dequantize_rows(weight: WeightView | None, first: int, last: int, dtype: torch.dtype) -> Tensor | None:
    """Rows ``first`` up to ``last`` in ``dtype``, [rows, columns]; None where no kernel is in use or accepts the weight."""
    made = library()
    if made is None or weight is None or dtype not in KINDS:
        return None
    out = torch.empty(last - first, weight.columns, dtype=dtype)
    threads = 1 if out.numel() <= ONE_THREAD_NUMBERS else torch.get_num_threads()
    call = function(made, "veneer_dequantize", (_INT, _POINTER, _LONG, _LONG, _POINTER, _INT), _INT)
    return out if call(KINDS[dtype], ctypes.addressof(weight), first, last, out.data_ptr(), threads) else None
