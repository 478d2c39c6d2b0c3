"""Attention inside segments of a flat batch: segments never see each other.

    out_t = sum_u softmax_u(cap(scale * q_t . k_u)) v_u,   u in t's own segment with  t - before <= u <= t + after

with cap(s) = softcap * tanh(s / softcap) where a model asks for it. A causal layer has ``after`` 0, a causal window
of W tokens has ``before`` W - 1, and None means no limit. A sink is one more logit per head in the softmax whose
value is zero.

There are two forms here, each fed with segments of equal length together, so nothing is padded and a NaN stays in its
segment; the fastest, in C++, is `attention_native`. ``plain`` calls PyTorch's attention; it is the reference.
``tiled`` is for training in bf16 on a CPU without a compiler, where the backward of PyTorch's attention is several
times slower than its forward: explicit matrix products, the heads of a group stacked as rows over one K and V instead
of repeating them, and tiles of queries that leave out the keys that none of them sees. With P the softmax's output of a tile:

    dV += P^T dO,   dS = P * (dO V^T - rowsum(P * dO V^T)),   dQ = scale dS K,   dK += scale dS^T Q

P is kept for short segments and computed again for longer ones. ``segment_attention`` chooses between the forms, by
the rules in ``_prefers_native`` and ``_prefers_tiled``.

Shapes: H query heads, G key/value heads, R = H / G query heads to a key head, T tokens of all segments, N segments
of one length, L tokens of a segment, D head size, E head size of the values. Boundary: nothing here knows of
models; windows and caps arrive as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from veneer.kernels.attention.native import native, pays, takes
from veneer.kernels.attention.segments import Pattern, Segments

__all__ = ["plain", "segment_attention", "tiled"]

_TILE = 128  # queries taken together
_SMALL_TILE, _MANY = (
    64,
    12,
)  # and where the future is hidden and so many matrices are multiplied at once: half the keys are left out
_KEEP = 256  # up to this length the softmax's output is kept for backward
_LONGEST = 1024  # beyond, PyTorch's attention is as fast and keeps less
_LONGEST_NATIVE = 4096  # beyond, the sums over parts of a segment are no longer small


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
    """Attention per segment, by whichever form is faster here; arguments and result [T, H, E] as in ``plain``."""
    simple = pattern.softcap is None and sinks_H is None and dropout == 0.0
    if simple and _prefers_native(q_HTD, k_GTD, v_GTE, segments):
        return native(q_HTD, k_GTD, v_GTE, segments, pattern, scale=scale)
    if simple and _prefers_tiled(q_HTD, k_GTD, v_GTE, segments):
        return tiled(q_HTD, k_GTD, v_GTE, segments, pattern, scale=scale)
    return plain(q_HTD, k_GTD, v_GTE, segments, pattern, scale=scale, sinks_H=sinks_H, dropout=dropout)


def _prefers_native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> bool:
    """Where the form in C++ pays at all it is the fastest for all lengths, with gradients or without."""
    return bool(segments.starts) and takes(q, k, v) and pays() and max(segments.starts) <= _LONGEST_NATIVE


def _prefers_tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> bool:
    """The rule, from timings of forward and backward on CPUs with bf16 products: in fp32 the two forms are level."""
    if q.device.type != "cpu" or not q.dtype == k.dtype == v.dtype == torch.bfloat16 or not segments.starts:
        return False
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return trains and max(segments.starts) <= _LONGEST


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
    """The reference: PyTorch's own attention for all segments of one length at a time.

    Args:
        q_HTD: queries [H, T, D].
        k_GTD, v_GTE: keys [G, T, D] and values [G, T, E]; query head h uses key head h // R.
        scale: factor of the scores.
        sinks_H: one logit per head that takes part in the softmax and contributes nothing.
        dropout: probability of dropping an attention weight, drawn from torch's global generator.

    Returns:
        [T, H, E], contiguous.
    """
    tensors = [segments.grouped(x, 1) for x in (q_HTD, k_GTD, v_GTE)]
    outs = [q_HTD.new_empty(0, q_HTD.shape[0], v_GTE.shape[-1])]
    for length, first, last in segments.groups:
        q, k, v = (
            x[:, first:last].reshape(x.shape[0], -1, length, x.shape[2]).transpose(0, 1) for x in tensors
        )  # [N, heads, L, size]
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
    mask = None if causal else segments.hidden(pattern, range(length), length, q)
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
    """The formula written out, for what PyTorch's attention does not take: soft caps and sinks."""
    groups, length = k.shape[1], q.shape[2]
    q = q.unflatten(1, (groups, q.shape[1] // groups))  # [N, G, R, L, D]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k[:, :, None].transpose(-1, -2)).to(wide) * scale
    if pattern.softcap is not None:
        scores = torch.tanh(scores / pattern.softcap) * pattern.softcap
    hidden = segments.hidden(pattern, range(length), length, scores)
    if hidden is not None:
        scores = scores + hidden
    if sinks_H is not None:
        sinks = sinks_H.to(wide).view(1, groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = F.dropout(weights.to(q.dtype), dropout, training=dropout > 0)
    out: torch.Tensor = weights @ v[:, :, None]
    return out.flatten(1, 2)


def tiled(
    q_HTD: torch.Tensor,
    k_GTD: torch.Tensor,
    v_GTE: torch.Tensor,
    segments: Segments,
    pattern: Pattern,
    *,
    scale: float,
) -> torch.Tensor:
    """Explicit products with their own backward; arguments and result [T, H, E] as in ``plain``, without its options."""
    out: torch.Tensor = _Tiled.apply(q_HTD, k_GTD, v_GTE, segments, pattern, scale)  # type: ignore[no-untyped-call]
    return out


def _tiles(length: int, matrices: int, pattern: Pattern) -> Iterator[range]:
    """Ranges of queries, all but the last of one size, none much above the size of a tile."""
    tile = _SMALL_TILE if matrices >= _MANY and pattern.after == 0 else _TILE
    size = -(-length // max(1, round(length / tile)))
    return (range(start, min(start + size, length)) for start in range(0, length, size))


def _by_key_head(x_HTD: torch.Tensor, groups: int, segments: Segments) -> torch.Tensor:
    """[G, T, R, D] with tokens in the segments' order, so that a segment's rows of one key head lie together."""
    heads, tokens, size = x_HTD.shape
    x = x_HTD.view(groups, heads // groups, tokens, size).transpose(1, 2)
    return segments.grouped(x, 1).contiguous()


def _rows(x_GTRD: torch.Tensor, length: int, first: int, last: int) -> torch.Tensor:
    """[G * N, L * R, D]: one batch of matrices for the segments of one length."""
    return x_GTRD[:, first:last].reshape(-1, length * x_GTRD.shape[2], x_GTRD.shape[3])


def _weights(
    q: torch.Tensor, k: torch.Tensor, segments: Segments, pattern: Pattern, queries: range, length: int, scale: float
) -> torch.Tensor:
    """Softmax of one tile, [G * N, tile * R, keys], from its queries and the keys that it sees."""
    mask = segments.hidden(pattern, queries, length, q, repeats=q.shape[1] // len(queries))
    if mask is None:
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    else:
        scores = torch.baddbmm(mask[None], q, k.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1)


class _Tiled(torch.autograd.Function):
    """See the head of this file for the formulas."""

    @staticmethod
    def forward(
        ctx: Any,
        q_HTD: torch.Tensor,
        k_GTD: torch.Tensor,
        v_GTE: torch.Tensor,
        segments: Segments,
        pattern: Pattern,
        scale: float,
    ) -> torch.Tensor:
        (heads, tokens, _), groups = q_HTD.shape, k_GTD.shape[0]
        q, k, v = (_by_key_head(x, groups, segments) for x in (q_HTD, k_GTD, v_GTE))
        repeats = heads // groups
        out = q.new_empty(groups, tokens, repeats, v.shape[-1])
        kept: list[torch.Tensor] = []
        for length, first, last in segments.groups:
            qs, ks, vs = (_rows(x, length, first, last) for x in (q, k, v))
            rows = out[:, first:last].view(groups, -1, length * repeats, out.shape[-1])
            for tile in _tiles(length, len(qs), pattern):
                at, seen = slice(tile.start * repeats, tile.stop * repeats), pattern.keys(tile, length)
                keys = slice(seen.start, seen.stop)
                p = _weights(qs[:, at], ks[:, keys], segments, pattern, tile, length, scale)
                rows[:, :, at] = torch.bmm(p, vs[:, keys]).view(groups, -1, *p.shape[1:2], out.shape[-1])
                if length <= _KEEP:
                    kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.segments, ctx.pattern, ctx.scale = segments, pattern, scale
        return segments.ungrouped(out, 1).transpose(0, 1).reshape(tokens, heads, v.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out_THE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        segments: Segments = ctx.segments
        d_out = _by_key_head(d_out_THE.transpose(0, 1), q.shape[0], segments)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        used = 0
        for length, first, last in segments.groups:
            blocks = [_rows(x, length, first, last) for x in (q, k, v, d_out)]
            tiles = list(_tiles(length, len(blocks[0]), ctx.pattern))
            mine = kept[used : used + len(tiles)] if length <= _KEEP else [None] * len(tiles)
            used += len(tiles) if length <= _KEEP else 0
            for grad, part in zip(grads, _tiled_backward(ctx, blocks, tiles, mine, length), strict=True):
                grad[:, first:last] = part.view(grad.shape[0], last - first, *grad.shape[2:])
        d_q, d_k, d_v = (segments.ungrouped(grad, 1) for grad in grads)
        d_q_HTD = d_q.transpose(1, 2).flatten(0, 1)
        return d_q_HTD, d_k.squeeze(2), d_v.squeeze(2), None, None, None


def _tiled_backward(
    ctx: Any, blocks: list[torch.Tensor], tiles: list[range], kept: list[torch.Tensor | None], length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ [G * N, L * R, D], dK and dV [G * N, L, size] of the segments of one length; sums over tiles are in fp32."""
    q, k, v, d_out = blocks
    repeats = q.shape[1] // length
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    d_q = torch.empty_like(q)
    d_k = d_v = torch.empty(0)
    if len(tiles) > 1:
        d_k, d_v = (torch.zeros_like(x, dtype=wide) for x in (k, v))
    for tile, p in zip(tiles, kept, strict=True):
        at, seen = slice(tile.start * repeats, tile.stop * repeats), ctx.pattern.keys(tile, length)
        keys = slice(seen.start, seen.stop)
        if p is None:
            p = _weights(q[:, at], k[:, keys], ctx.segments, ctx.pattern, tile, length, ctx.scale)
        d_p = torch.bmm(d_out[:, at], v[:, keys].transpose(1, 2))
        d_s = torch._softmax_backward_data(d_p, p, -1, q.dtype)
        d_q[:, at] = torch.bmm(d_s, k[:, keys])
        part_k, part_v = torch.bmm(d_s.transpose(1, 2), q[:, at]), torch.bmm(p.transpose(1, 2), d_out[:, at])
        if len(tiles) == 1:
            d_k, d_v = part_k, part_v
        else:
            d_k[:, keys] += part_k
            d_v[:, keys] += part_v
    return d_q.mul_(ctx.scale), d_k.mul_(ctx.scale), d_v
