"""Dequantizing four bits in C++ (``cpp/quantized.cpp``), on a CPU.

A block's 16 products of code and absmax are computed and rounded once; its numbers are looked up among them. The result has the bits of the
form in torch (`four_bit.py`), which runs where there is no library.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from veneer.kernels.cpp_library import KINDS, function, library
from veneer.kernels.tuning import ONE_THREAD_NUMBERS

__all__ = ["dequantize_4bit"]

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p
_ARGUMENTS = (_INT, _INT, *[_POINTER] * 4, _FLOAT, _POINTER, *[_LONG] * 3, _POINTER, _INT)
_ROUNDINGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    double: tuple[Tensor, Tensor, float] | None,
    code: Tensor,
    *,
    block: int,
    numbers: tuple[int, int],
    rounding: torch.dtype,
    dtype: torch.dtype,
) -> Tensor | None:
    """Numbers from the first up to the last of ``numbers``, in ``dtype``; None where no kernel is in use or accepts the inputs.

    Args:
        packed, absmax, code: as `FourBit` has them.
        double: the map of quantized absmax, their absmax, and their offset; None without double quantization.
        block: size of a block.
        rounding: the data type that values are rounded to first.
    """
    made = library()
    tensors = (packed, absmax, *(() if double is None else double[:2]))
    if made is None or dtype not in KINDS or rounding not in _ROUNDINGS:
        return None
    if not all(t.is_cpu and t.is_contiguous() for t in tensors):
        return None
    first, last = numbers
    out = torch.empty(last - first, dtype=dtype)
    mapped, outer, offset = (
        (None, None, 0.0) if double is None else (double[0].data_ptr(), double[1].data_ptr(), double[2])
    )
    addresses = (packed.data_ptr(), absmax.data_ptr(), mapped, outer, offset, code.data_ptr())
    threads = 1 if out.numel() <= ONE_THREAD_NUMBERS else torch.get_num_threads()
    call = function(made, "veneer_dequantize_4bit", _ARGUMENTS, _INT)
    kinds = (KINDS[dtype], _ROUNDINGS[rounding])
    return out if call(*kinds, *addresses, block, first, last, out.data_ptr(), threads) else None
