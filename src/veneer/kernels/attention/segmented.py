"""Attention inside the segments of a flat batch: segments never see each other.

    out_t = sum_u softmax_u(cap(scale * q_t . k_u)) v_u,   u in the segment of t with  t - before <= u <= t + after

with cap(s) = softcap * tanh(s / softcap) where a model has a soft cap. A causal layer has ``after`` 0, a causal window of W tokens
has ``before`` W - 1, and None means no limit. A sink is one more logit per head in the softmax whose value is zero.

``plain`` is the reference and calls PyTorch's attention; ``native.py`` is the form in C++ for CPUs, ``varlen.py`` that for CUDA. None of
them pads, and a NaN stays in its segment.

Shapes: H query heads, G key/value heads, T tokens of all segments, N segments of one length, L tokens of a segment, D head size,
E head size of the values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from veneer.kernels.attention.native import native, takes
from veneer.kernels.attention.segments import Pattern, Segments
from veneer.kernels.attention.varlen import takes as takes_varlen
from veneer.kernels.attention.varlen import varlen
from veneer.kernels.cpp_library import supported
from veneer.kernels.forms import forms
from veneer.kernels.tuning import LONGEST_NATIVE_SEGMENT

__all__ = ["plain", "segment_attention"]


def segment_attention(
    q_HTD: torch.Tensor,
    k_GTD: torch.Tensor,
    v_GTE: torch.Tensor,
    segments: Segments,
    pattern: Pattern,
    *,
    scale: float,
    sinks_H: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute attention per segment by the fastest form; arguments and result [T, H, E] as in ``plain``."""
    simple = pattern.softcap is None and sinks_H is None and dropout == 0.0
    if simple and _prefers_native(q_HTD, k_GTD, v_GTE, segments):
        return native(q_HTD, k_GTD, v_GTE, segments, pattern, scale=scale)
    if simple and forms().attention == "varlen" and segments.starts and takes_varlen(q_HTD, k_GTD, v_GTE):
        return varlen(q_HTD, k_GTD, v_GTE, segments, pattern, scale=scale)
    return plain(q_HTD, k_GTD, v_GTE, segments, pattern, scale=scale, sinks_H=sinks_H, dropout=dropout)


def _prefers_native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> bool:
    return bool(segments.starts) and takes(q, k, v) and supported() and max(segments.starts) <= LONGEST_NATIVE_SEGMENT


def plain(
    q_HTD: torch.Tensor,
    k_GTD: torch.Tensor,
    v_GTE: torch.Tensor,
    segments: Segments,
    pattern: Pattern,
    *,
    scale: float,
    sinks_H: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute the reference: PyTorch's attention for all segments of one length at a time.

    Args:
        q_HTD: queries [H, T, D].
        k_GTD, v_GTE: keys [G, T, D] and values [G, T, E]; query head h uses key head h // (H / G).
        segments: segments of the T tokens.
        pattern: visible keys and soft cap.
        scale: factor of the scores.
        sinks_H: one logit per head that takes part in the softmax and contributes nothing.
        dropout: probability of dropping an attention weight; draws from torch's global generator.

    Returns:
        [T, H, E], contiguous.
    """
    tensors = [segments.grouped(x, 1) for x in (q_HTD, k_GTD, v_GTE)]
    outs = [q_HTD.new_empty(0, q_HTD.shape[0], v_GTE.shape[-1])]
    for length, first, last in segments.groups:
        # Each [N, heads, L, size].
        q, k, v = (x[:, first:last].reshape(x.shape[0], -1, length, x.shape[2]).transpose(0, 1) for x in tensors)
        if pattern.softcap is None and sinks_H is None:
            out = _torch_attention(q, k, v, segments, pattern, scale, dropout)
        else:
            out = _explicit(q, k, v, segments, pattern, scale, sinks_H, dropout)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return segments.ungrouped(torch.cat(outs), 0)


def _torch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    pattern: Pattern,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    length = q.shape[2]
    causal = pattern.after == 0 and (pattern.before is None or pattern.before >= length - 1)
    mask = None if causal else segments.mask(pattern, length, q)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal and length > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    pattern: Pattern,
    scale: float,
    sinks_H: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Compute the formula in explicit steps, for soft caps and sinks, which PyTorch's attention does not support."""
    groups, length = k.shape[1], q.shape[2]
    q = q.unflatten(1, (groups, q.shape[1] // groups))  # [N, G, R, L, D]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k[:, :, None].transpose(-1, -2)).to(wide) * scale
    if pattern.softcap is not None:
        scores = torch.tanh(scores / pattern.softcap) * pattern.softcap
    mask = segments.mask(pattern, length, scores)
    if mask is not None:
        scores = scores + mask
    if sinks_H is not None:
        sinks = sinks_H.to(wide).view(1, groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = F.dropout(weights.to(q.dtype), dropout, training=dropout > 0)
    out: torch.Tensor = weights @ v[:, :, None]
    return out.flatten(1, 2)
