"""Where the segments of a flat batch lie, and which keys a query sees inside its own.

A flat batch holds the tokens of all segments behind each other. Attention works on segments of equal length
together, so ``Segments`` knows an order of the tokens in which these are neighbours; and it keeps the masks that
were built for the batch, since all layers need the same few.

Shapes: T tokens of all segments, L tokens of one.
Boundary: numbers only; nothing is computed with activations here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

__all__ = ["Pattern", "Segments"]


@dataclass(frozen=True)
class Segments:
    """Where the segments of a flat batch lie; built once for a batch and used by every layer.

    Attributes:
        bounds: S + 1 ascending token numbers; segment s is [bounds[s], bounds[s + 1]).
    """

    bounds: tuple[int, ...]
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, offsets: torch.Tensor) -> Segments:
        """From the offsets tensor [S + 1] of a flat batch."""
        return cls(tuple(int(bound) for bound in offsets.tolist()))

    @property
    def tokens(self) -> int:
        """T, the number of tokens in all segments."""
        return self.bounds[-1]

    @cached_property
    def offsets(self) -> ctypes.Array[ctypes.c_long]:
        """The bounds for a kernel in C++."""
        return (ctypes.c_long * len(self.bounds))(*self.bounds)

    @cached_property
    def starts(self) -> dict[int, list[int]]:
        """For each length that occurs, ascending, where its segments begin; empty segments are left out."""
        found: dict[int, list[int]] = {}
        for start, end in zip(self.bounds, self.bounds[1:], strict=False):
            if end > start:
                found.setdefault(end - start, []).append(start)
        return dict(sorted(found.items()))

    @cached_property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """(L, first, last) for each length: the range [first, last) that its tokens take in ``order``."""
        found, first = [], 0
        for length, starts in self.starts.items():
            found.append((length, first, first + length * len(starts)))
            first = found[-1][2]
        return tuple(found)

    @cached_property
    def order(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tokens with segments of equal length together, and the way back, [T] each; None if they stand so."""
        tokens = [t for length, starts in self.starts.items() for start in starts for t in range(start, start + length)]
        if all(token == place for place, token in enumerate(tokens)):
            return None
        there = torch.tensor(tokens)
        return there, torch.argsort(there)

    def grouped(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """``x`` with its token dimension in ``order``."""
        return x if self.order is None else x.index_select(dim, self.order[0].to(x.device))

    def ungrouped(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of ``grouped``."""
        return x if self.order is None else x.index_select(dim, self.order[1].to(x.device))

    def hidden(
        self, pattern: Pattern, queries: range, length: int, like: torch.Tensor, repeats: int = 1
    ) -> torch.Tensor | None:
        """[queries * repeats, keys]: 0 where a query sees a key and -inf elsewhere; None if all see all.

        The keys are ``pattern.keys(queries, length)``; each query's row stands there ``repeats`` times; dtype and
        device are those of ``like``. A mask is built once for the batch.
        """
        if not pattern.hides(length):
            return None
        keys = pattern.keys(queries, length)
        name = (pattern.before, pattern.after, queries, keys, repeats, like.dtype, like.device)
        mask = self._masks.get(name)
        if mask is None:
            seen = pattern.visible(queries, keys, like.device).repeat_interleave(repeats, dim=0)
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
            self._masks[name] = mask
        return mask


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees inside its segment, and what is done to the scores.

    Attributes:
        before, after: how many tokens back and ahead a query sees; None means all.
        softcap: scores become softcap * tanh(score / softcap).
    """

    before: int | None = None
    after: int | None = 0
    softcap: float | None = None

    def hides(self, length: int) -> bool:
        """Whether any key of a segment of this length is hidden from any of its queries."""
        return any(reach is not None and reach < length - 1 for reach in (self.before, self.after))

    def visible(self, queries: range, keys: range, device: torch.device) -> torch.Tensor:
        """Bool [queries, keys]: may query i see key j."""
        ahead = (
            torch.arange(keys.start, keys.stop, device=device)
            - torch.arange(queries.start, queries.stop, device=device)[:, None]
        )
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if self.before is not None:
            seen &= ahead >= -self.before
        if self.after is not None:
            seen &= ahead <= self.after
        return seen

    def keys(self, queries: range, length: int) -> range:
        """The keys that any of the queries sees."""
        first = 0 if self.before is None else max(0, queries.start - self.before)
        last = length if self.after is None else min(length, queries.stop + self.after)
        return range(first, last)
