"""PyTorch's attention for sequences of several lengths, written out: its kernel exists on CUDA only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def reference_varlen(calls: list[Any]) -> Callable[..., Tensor]:
    """A function with the arguments of ``torch.nn.attention.varlen.varlen_attn``, which notes its calls."""

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        num_splits: int | None = None,
    ) -> Tensor:
        calls.append({"window_size": window_size, "enable_gqa": enable_gqa, "num_splits": num_splits})
        assert cu_seq_q.dtype == torch.int32 and cu_seq_k is cu_seq_q and max_q == max_k
        bounds = cu_seq_q.tolist()
        assert max_q == max(b - a for a, b in itertools.pairwise(bounds))
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        assert query.shape[1] == key.shape[1]
        left, right = window_size
        outs = []
        for first, last in itertools.pairwise(bounds):
            scores = torch.einsum("qhd,khd->hqk", query[first:last], key[first:last]) * scale
            at = torch.arange(last - first, device=query.device)
            ahead = at - at[:, None]
            hidden = torch.zeros_like(ahead, dtype=torch.bool)
            hidden |= (ahead < -left) if left >= 0 else hidden
            hidden |= (ahead > right) if right >= 0 else hidden
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, value[first:last]))
        return torch.cat(outs)

    return varlen_attn
