"""A flat batch in several processes, each of which has a share of its tokens (Ulysses: Jacobs et al. 2023, arXiv:2309.14509).

    tokens     t0 t1 t2 | t3 t4 t5        each process has T / S of them, and computes every layer but attention on them
    heads      h0 h1 | h2 h3              in attention it has H / S heads, and all tokens

Before attention the processes exchange tokens for heads, and after it heads for tokens; backward exchanges the gradients the same way.
Values are copied and never summed, so attention is that of the whole batch. Tokens are filled up to a multiple of S with a segment of
their own, which no other token sees and no loss counts.

Shapes: S processes (seats), T tokens in all, t here; H heads, G of keys and values; D, E their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.errors import BaseModelError
from veneer.kernels.attention.segmented import segment_attention
from veneer.kernels.attention.segments import Pattern, Segments
from veneer.models.flat_attention import Attend
from veneer.models.layout import FlatLike, Layout


class SequenceSplit:
    """This process's share of each batch.

    Attributes:
        seat, seats: number of this process among those that share a batch, and of all.
        group: their process group.
    """

    def __init__(self, seat: int, seats: int, group: Any) -> None:
        self.seat = seat
        self.seats = seats
        self.group = group

    def window(self, tokens: int) -> tuple[int, int]:
        """The tokens [first, last) that this process has; the last may be fill."""
        size = -(-tokens // self.seats)
        return self.seat * size, (self.seat + 1) * size

    def here(self, batch: FlatLike, tokens: Tensor) -> Tensor:
        """Those of ascending tokens that this process has."""
        first, last = self.window(batch.ids.numel())
        return tokens[(tokens >= first) & (tokens < last)]

    def layout(self, batch: FlatLike) -> Layout:
        """One row with the tokens of this process; cells of other tokens lie outside of it."""
        total = batch.ids.numel()
        first, last = self.window(total)
        index = torch.arange(first, last)
        return Layout((1, len(index)), torch.where(index < total, index, -1), torch.arange(total) - first)

    def take(self, batch: FlatLike, layout: Layout) -> tuple[Tensor, Tensor]:
        """Ids and positions of this process's tokens; fill is a text of token 0."""
        real, at = layout.index >= 0, layout.index.clamp_min(0)
        return batch.ids[at] * real, torch.where(real, batch.positions[at], (~real).cumsum(0) - 1)

    def segments(self, offsets: Tensor) -> Segments:
        """The segments of the whole batch, with that of the fill."""
        total = int(offsets[-1])
        filled = -(-total // self.seats) * self.seats
        return Segments.of(offsets if filled == total else torch.cat((offsets, torch.tensor([filled]))))

    def attention(self, segments: Segments) -> Attend:
        """Attention of the whole batch by all its processes."""
        return partial(self._attend, segments)

    def _attend(
        self,
        segments: Segments,
        _number: int,
        q_HtD: Tensor,
        k_GtD: Tensor,
        v_GtE: Tensor,
        pattern: Pattern,
        scale: float,
        sinks_H: Tensor | None,
    ) -> Tensor:
        heads, groups = q_HtD.shape[0], k_GtD.shape[0]
        if heads % self.seats or groups % self.seats:
            raise BaseModelError(
                f"a layer with {heads} heads and {groups} of keys and values cannot be divided among {self.seats} processes; use another "
                "sequence_parallel"
            )
        q, k, v = _ToHeads.apply(self, q_HtD, k_GtD, v_GtE)  # type: ignore[no-untyped-call]
        mine = None if sinks_H is None else sinks_H.view(self.seats, -1)[self.seat]
        out_ThE = segment_attention(q, k, v, segments, pattern, scale=scale, sinks_H=mine)
        out_tHE: Tensor = _ToTokens.apply(self, out_ThE)  # type: ignore[no-untyped-call]
        return out_tHE

    def exchange(self, sent_S: Tensor) -> Tensor:
        """Send the s-th part [S, n] to the s-th process, and receive one part from each."""
        received_S = torch.empty_like(sent_S)
        torch.distributed.all_to_all_single(received_S, sent_S, group=self.group)
        return received_S


def _heads_for_tokens(split: SequenceSplit, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [H, t, D] of all heads and some tokens as [H / S, T, D], in one exchange."""
    seats = split.seats
    shapes = [(seats, x.shape[0] // seats, *x.shape[1:]) for x in tensors]
    sent = torch.cat([x.reshape(seats, -1) for x in tensors], 1)
    parts = split.exchange(sent).split([x.numel() // seats for x in tensors], 1)
    views = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [x.transpose(0, 1).reshape(x.shape[1], -1, x.shape[3]) for x in views]


def _tokens_for_heads(split: SequenceSplit, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_heads_for_tokens`."""
    seats = split.seats
    views = [x.reshape(x.shape[0], seats, -1, x.shape[2]).transpose(0, 1) for x in tensors]
    sent = torch.cat([x.reshape(seats, -1) for x in views], 1)
    parts = split.exchange(sent).split([x.numel() // seats for x in tensors], 1)
    return [part.reshape(-1, *x.shape[2:]) for part, x in zip(parts, views, strict=True)]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: SequenceSplit, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.split = split
        return tuple(_heads_for_tokens(split, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_tokens_for_heads(ctx.split, grads))


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: SequenceSplit, out_ThE: Tensor) -> Tensor:
        ctx.split = split
        return _tokens_for_heads(split, [out_ThE.transpose(0, 1)])[0].transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tHE: Tensor) -> tuple[Tensor | None, ...]:
        return None, _heads_for_tokens(ctx.split, [grad_tHE.transpose(0, 1)])[0].transpose(0, 1).contiguous()
