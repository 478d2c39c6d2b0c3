"""Attention inside segments by PyTorch's kernel for sequences of several lengths (``torch.nn.attention.varlen``), on CUDA.

All segments go through one call, whatever their lengths, where the plain form takes one call for each length. A segment's result does not
depend on its neighbours: the kernel splits no segment (``num_splits=1``), where this version of PyTorch can be told so.

Soft caps, sinks and dropout are left to the plain form, and so are data types other than bf16 and fp16.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch

from veneer.kernels.attention.segments import Pattern, Segments

__all__ = ["takes", "varlen"]

_LARGEST_HEAD = 256
_CAPABILITY = (8, 0)


@cache
def _kernel() -> tuple[Any, frozenset[str]]:
    """PyTorch's function and the names of its parameters; (None, none) in versions that do not have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def takes(q_HTD: torch.Tensor, k_GTD: torch.Tensor, v_GTE: torch.Tensor) -> bool:
    """True if the kernel accepts tensors like these."""
    return (
        q_HTD.is_cuda
        and q_HTD.dtype in (torch.bfloat16, torch.float16)
        and q_HTD.dtype == k_GTD.dtype == v_GTE.dtype
        and q_HTD.shape[-1] == v_GTE.shape[-1] <= _LARGEST_HEAD
        and q_HTD.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(q_HTD.device) >= _CAPABILITY
        and {"scale", "window_size"} <= _kernel()[1]
    )


def varlen(
    q_HTD: torch.Tensor,
    k_GTD: torch.Tensor,
    v_GTE: torch.Tensor,
    segments: Segments,
    pattern: Pattern,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention per segment; arguments and result [T, H, E] as in ``plain`` (``segmented.py``)."""
    attend, known = _kernel()
    q, k, v = (x.transpose(0, 1) for x in (q_HTD, k_GTD, v_GTE))
    options: dict[str, Any] = {"scale": scale, "window_size": (_reach(pattern.before), _reach(pattern.after))}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if "num_splits" in known:
        options["num_splits"] = 1
    bounds, longest = segments.cumulative(q.device), max(segments.starts)
    out: torch.Tensor = attend(q, k, v, bounds, bounds, longest, longest, **options)
    return out


def _reach(tokens: int | None) -> int:
    """A reach of the pattern as the kernel has it: -1 for all."""
    return -1 if tokens is None else tokens
