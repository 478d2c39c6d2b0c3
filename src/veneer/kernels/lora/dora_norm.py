"""Row norms of W + s B A without forming it.

    ||W_o + s (BA)_o||^2 = ||W_o||^2 + 2 s <(W A^T)_o, B_o> + s^2 B_o (A A^T) B_o^T

||W||^2 is computed once per base weight and cached by the caller. Cost: one product of W with the r rows of A, and nothing of
size out x in is ever allocated. At B = 0 the result is sqrt(||W||^2) to the bit, except in a row of zeros, so a magnitude that
starts there gives a magnitude scale of exactly one. (DoRA, arXiv 2402.09353, eq. 5; the identity is plain algebra.)
Norms of several adapters at one weight take one pass over it where kernels in C++ are in use (`dora_norms`). Shapes: O out, K in, R rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.cpp_library import KINDS, library

_ROWS_AT_ONCE = 1024


def squared_row_norms(weight_OK: Tensor) -> Tensor:
    """||W_o||^2 in fp32 (fp64 for an fp64 weight), [O]; rows are upcast a block at a time."""
    wide = torch.promote_types(weight_OK.dtype, torch.float32)
    blocks = [block.to(wide).square().sum(1) for block in weight_OK.detach().split(_ROWS_AT_ONCE)]
    return torch.cat(blocks)


def dora_norm(weight_OK: Tensor, squared_O: Tensor, a_RK: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """||W + s B A||_row, [O], in the dtype of ``squared_O``; differentiable in A and B (callers detach, section 4.3).

    weight_OK: the base weight as [out, in]; squared_O: `squared_row_norms(weight_OK)`.
    """
    wide = squared_O.dtype
    wa_OR = (weight_OK @ a_RK.to(weight_OK.dtype).T).to(wide)
    a_RK, b_OR = a_RK.to(wide), b_OR.to(wide)
    cross_O = (wa_OR * b_OR).sum(1)
    change_O = ((b_OR @ (a_RK @ a_RK.T)) * b_OR).sum(1)
    # A row of zeros has no direction: the smallest normal number keeps its magnitude scale 0 / norm, and the root's gradient, finite.
    square_O = (squared_O + 2 * scale * cross_O + scale * scale * change_O).clamp_min(torch.finfo(wide).tiny)
    norm_O: Tensor = square_O.sqrt()
    return norm_O


ScaledFactors = tuple[Tensor, Tensor, float]
"""A [R, K], B [O, R], s of one adapter."""


class NormArguments(ctypes.Structure):
    """One adapter of a call in C++: its factors, and where its squared norms go."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("square", ctypes.c_void_p),
        ("rank", ctypes.c_long),
        ("scale", ctypes.c_float),
    ]


_HIGHEST = 64
"""The highest rank that the C++ kernel takes."""


def dora_norms(weight_OK: Tensor, squared_O: Tensor, adapters: Sequence[ScaledFactors]) -> list[Tensor]:
    """`dora_norm` of each adapter, without gradients. In C++ products with A are taken in fp32, and W is read once for all."""
    made = library()
    if made is None or not all(_fits(weight_OK, squared_O, a, b) for a, b, _ in adapters):
        with torch.no_grad():
            return [dora_norm(weight_OK, squared_O, *adapter) for adapter in adapters]
    found = [torch.empty_like(squared_O) for _ in adapters]
    each = (NormArguments * len(adapters))()
    for one, (a, b, scale), square in zip(each, adapters, found, strict=True):
        one.a, one.b, one.square, one.rank, one.scale = a.data_ptr(), b.data_ptr(), square.data_ptr(), len(a), scale
    made.veneer_dora_squared_norms(
        KINDS[weight_OK.dtype],
        ctypes.c_void_p(weight_OK.data_ptr()),
        *map(ctypes.c_long, weight_OK.shape),
        ctypes.c_void_p(squared_O.data_ptr()),
        each,
        ctypes.c_long(len(adapters)),
        torch.get_num_threads(),
    )
    return [square.sqrt_() for square in found]  # torch's root, to the bit that a magnitude starts from


def _fits(weight_OK: Tensor, squared_O: Tensor, a_RK: Tensor, b_OR: Tensor) -> bool:
    tensors = (weight_OK, squared_O, a_RK, b_OR)
    laid = all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    wide = a_RK.dtype == b_OR.dtype == squared_O.dtype == torch.float32
    return laid and wide and weight_OK.dtype in KINDS and weight_OK.shape[1] % 16 == 0 and len(a_RK) <= _HIGHEST
