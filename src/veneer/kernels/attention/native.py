"""Attention inside segments in C++ (``cpp/attention.cpp``), for fp32 and bf16 on a CPU.

    S = scale Q K^T,   P = 2^(log2(e) S - l),   O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(dO * O)),   dQ = scale dS K,   dK = scale dS^T Q

with l, one number per row, the base-2 logarithm of the row's sum. The formulas are those of ``segmented.plain``, the reference; but P is
not kept, tensors are read in place, segments may have any lengths, and keys that no query of a block sees are skipped. Sums are in
fp32; P and dS are rounded to the tensors' dtype, as matrix products need them.

Shapes as in ``segmented.py``. Gradients are stored as [T, H, D], the layout that projections use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.attention.segments import Pattern, Segments
from veneer.kernels.cpp_library import KINDS, library

__all__ = ["native", "takes"]

_STEP, _WIDEST = 16, 256
"""Head sizes must be multiples of the first number and at most the second."""
_Sizes, _Pointers = ctypes.c_long * 23, ctypes.c_void_p * 8


def takes(q_HTD: Tensor, k_GTD: Tensor, v_GTE: Tensor) -> bool:
    """Return True if the kernels are in use and accept these tensors."""
    if library() is None or q_HTD.dtype not in KINDS or not q_HTD.dtype == k_GTD.dtype == v_GTE.dtype:
        return False
    if q_HTD.shape[-1] != k_GTD.shape[-1] or k_GTD.shape[0] == 0 or q_HTD.shape[0] % k_GTD.shape[0]:
        return False
    sizes = (q_HTD.shape[-1], v_GTE.shape[-1])
    fit = all(size % _STEP == 0 and 0 < size <= _WIDEST for size in sizes)
    return fit and all(x.device.type == "cpu" and x.stride(-1) == 1 for x in (q_HTD, k_GTD, v_GTE))


def native(
    q_HTD: Tensor, k_GTD: Tensor, v_GTE: Tensor, segments: Segments, pattern: Pattern, *, scale: float
) -> Tensor:
    """Compute attention; arguments and result [T, H, E] as in ``segmented.plain``, for tensors that ``takes`` accepts."""
    out: Tensor = _Native.apply(q_HTD, k_GTD, v_GTE, segments, pattern, scale)  # type: ignore[no-untyped-call]
    return out


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_HTD: Tensor, k_GTD: Tensor, v_GTE: Tensor, segments: Segments, pattern: Pattern, scale: float
    ) -> Tensor:
        heads, tokens, _ = q_HTD.shape
        out = q_HTD.new_empty(tokens, heads, v_GTE.shape[-1])
        sums_HT = torch.empty(heads, tokens) if any(ctx.needs_input_grad) else None
        made = ctx.made = library()  # backward uses the same library, even if another one is in use by then
        _run(made, (q_HTD, k_GTD, v_GTE, out.transpose(0, 1)), segments, pattern, scale, sums_HT)
        ctx.save_for_backward(q_HTD, k_GTD, v_GTE, out, sums_HT)
        ctx.segments, ctx.pattern, ctx.scale = segments, pattern, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_THE: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums_HT = ctx.saved_tensors
        if d_out_THE.stride(-1) != 1:
            d_out_THE = d_out_THE.contiguous()
        grads = [x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1) for x in (q, k, v)]
        tensors = (q, k, v, out.transpose(0, 1), d_out_THE.transpose(0, 1), *grads)
        _run(ctx.made, tensors, ctx.segments, ctx.pattern, ctx.scale, sums_HT)
        return (*grads, None, None, None)


def _run(
    made: ctypes.CDLL | None,
    tensors: Sequence[Tensor],
    segments: Segments,
    pattern: Pattern,
    scale: float,
    sums_HT: Tensor | None,
) -> None:
    """Run the kernel on q, k, v, out (written), and for backward also d_out, dq, dk, dv (written), all [heads, T, size]."""
    assert made is not None
    q, k, v = tensors[:3]
    limits = (-1 if reach is None else reach for reach in (pattern.before, pattern.after))
    strides = (stride for x in tensors for stride in (x.stride(1), x.stride(0)))
    bounds = segments.offsets
    made.veneer_attention(
        KINDS[q.dtype],
        _Sizes(len(bounds) - 1, q.shape[0], k.shape[0], q.shape[2], v.shape[2], *limits, *strides),
        bounds,
        _Pointers(*(x.data_ptr() for x in tensors)),
        ctypes.c_float(scale),
        ctypes.c_void_p(None if sums_HT is None else sums_HT.data_ptr()),
        torch.get_num_threads(),
    )
