"""Attention of new tokens over keys and values in a cache, sequence by sequence.

    out_t = sum_u softmax_u(cap(scale * q_t . k_u)) v_u,   u in the context of t's sequence with  t - before <= u <= t

A cache is one row per slot: keys [S, G, D] and values [S, G, E]. A sequence's tokens stand in any slots; its context is the list of them in
order, and its new tokens, whose keys and values the cache has already, are the last of it.

Shapes: H query heads, G key/value heads, T new tokens of all sequences, S slots, D and E head sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.attention.segments import Pattern

__all__ = ["Context", "paged_attention"]


@dataclass(frozen=True)
class Context:
    """The new tokens [first, last) of a sequence in the flat batch, and the slots of all of its tokens [L], the new ones included."""

    first: int
    last: int
    slots: Tensor


def paged_attention(
    q_HTD: Tensor,
    k_SGD: Tensor,
    v_SGE: Tensor,
    contexts: Sequence[Context],
    pattern: Pattern,
    *,
    scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Compute attention of every sequence's new tokens over its context, [T, H, E].

    Args:
        q_HTD: queries.
        k_SGD, v_SGE: the cache; query head h uses key head h // (H / G).
        contexts: the sequences, in the order of their tokens.
        pattern: visible keys and soft cap; ``after`` must be 0.
        scale: factor of the scores.
        sinks_H: one logit per head that takes part in the softmax and contributes nothing.
    """
    out_THE = q_HTD.new_empty(q_HTD.shape[1], q_HTD.shape[0], v_SGE.shape[2])
    for context in contexts:
        q = q_HTD[:, context.first : context.last]
        first = 0  # keys further back than any query sees are not read
        if pattern.before is not None:
            first = max(0, len(context.slots) - (context.last - context.first) - pattern.before)
        slots = context.slots[first:]
        k, v = k_SGD[slots], v_SGE[slots]
        mask = _mask(len(slots), context.last - context.first, pattern, q)
        if pattern.softcap is None and sinks_H is None:
            out = F.scaled_dot_product_attention(
                q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask, scale=scale, enable_gqa=True
            )[0]
        else:
            out = _explicit(q, k, v, mask, pattern, scale, sinks_H)
        out_THE[context.first : context.last] = out.transpose(0, 1)
    return out_THE


def _mask(keys: int, queries: int, pattern: Pattern, like: Tensor) -> Tensor | None:
    """[queries, keys] with 0 where the query sees the key and -inf elsewhere; None if all see all."""
    if queries == 1 and (pattern.before is None or pattern.before >= keys - 1):
        return None
    ahead = torch.arange(keys, device=like.device) - torch.arange(keys - queries, keys, device=like.device)[:, None]
    hidden = ahead > 0
    if pattern.before is not None:
        hidden |= ahead < -pattern.before
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def _explicit(
    q_HND: Tensor,
    k_LGD: Tensor,
    v_LGE: Tensor,
    mask: Tensor | None,
    pattern: Pattern,
    scale: float,
    sinks_H: Tensor | None,
) -> Tensor:
    """The formula in explicit steps, for soft caps and sinks, [H, N, E]."""
    heads, groups = q_HND.shape[0], k_LGD.shape[1]
    q = q_HND.unflatten(0, (groups, heads // groups))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k_LGD.permute(1, 2, 0)[:, None]).to(wide) * scale
    if pattern.softcap is not None:
        scores = torch.tanh(scores / pattern.softcap) * pattern.softcap
    if mask is not None:
        scores = scores + mask
    if sinks_H is not None:
        sinks = sinks_H.to(wide).view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    out: Tensor = weights.to(q.dtype) @ v_LGE.transpose(0, 1)[:, None]
    return out.flatten(0, 1)
