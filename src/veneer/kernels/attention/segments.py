"""Positions of the segments of a flat batch, and the keys that a query sees inside its segment.

A flat batch holds the tokens of all segments one after another. Attention works on segments of equal length together, so
``Segments`` provides an order of the tokens in which these are adjacent. It also keeps the masks that were built for the batch, since all
layers need the same few.

Shapes: T tokens of all segments, L tokens of one.
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
    """Positions of the segments of a flat batch; built once per batch and used by every layer.

    Attributes:
        bounds: S + 1 ascending token numbers; segment s is [bounds[s], bounds[s + 1]).
    """

    bounds: tuple[int, ...]
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    _orders: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    _bounds: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, offsets: torch.Tensor) -> Segments:
        """From the offsets tensor [S + 1] of a flat batch."""
        return cls(tuple(int(bound) for bound in offsets.tolist()))

    @property
    def tokens(self) -> int:
        """Number of tokens in all segments, T."""
        return self.bounds[-1]

    @cached_property
    def offsets(self) -> ctypes.Array[ctypes.c_long]:
        """``bounds`` as an array for a kernel in C++."""
        return (ctypes.c_long * len(self.bounds))(*self.bounds)

    @cached_property
    def starts(self) -> dict[int, list[int]]:
        """Start positions of the segments by length, ascending; empty segments are left out."""
        found: dict[int, list[int]] = {}
        for start, end in zip(self.bounds, self.bounds[1:], strict=False):
            if end > start:
                found.setdefault(end - start, []).append(start)
        return dict(sorted(found.items()))

    @cached_property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """(L, first, last) for each length: its tokens are [first, last) in ``order``."""
        found, first = [], 0
        for length, starts in self.starts.items():
            found.append((length, first, first + length * len(starts)))
            first = found[-1][2]
        return tuple(found)

    @cached_property
    def order(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Permutation that puts segments of equal length together, and its inverse, [T] each; None for the identity."""
        tokens = [t for length, starts in self.starts.items() for start in starts for t in range(start, start + length)]
        if tokens == list(range(len(tokens))):
            return None
        order = torch.tensor(tokens)
        return order, torch.argsort(order)

    def grouped(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """``x`` with its token dimension in ``order``."""
        order = self._order_on(x.device)
        return x if order is None else x.index_select(dim, order[0])

    def ungrouped(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of ``grouped``."""
        order = self._order_on(x.device)
        return x if order is None else x.index_select(dim, order[1])

    def _order_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``order`` on a device, moved there once per batch."""
        if self.order is None or device.type == "cpu":
            return self.order
        found = self._orders.get(device)
        if found is None:
            moved = torch.stack(self.order).to(device)
            found = self._orders[device] = (moved[0], moved[1])
        return found

    def cumulative(self, device: torch.device) -> torch.Tensor:
        """The bounds of the segments that are not empty, int32 on a device, moved there once per batch."""
        found = self._bounds.get(device)
        if found is None:
            kept = [0, *(end for start, end in zip(self.bounds, self.bounds[1:], strict=False) if end > start)]
            found = self._bounds[device] = torch.tensor(kept, dtype=torch.int32).to(device)
        return found

    def mask(self, pattern: Pattern, length: int, like: torch.Tensor) -> torch.Tensor | None:
        """[length, length] with 0 where a query sees a key and -inf elsewhere, in the dtype of ``like``; None if all see all.

        Each mask is built once per batch.
        """
        if not pattern.hides(length):
            return None
        key = (pattern.before, pattern.after, length, like.dtype, like.device)
        mask = self._masks.get(key)
        if mask is None:
            visible = pattern.visible(length, like.device)
            mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(
                ~visible, float("-inf")
            )
            self._masks[key] = mask
        return mask


@dataclass(frozen=True)
class Pattern:
    """Keys that a query sees inside its segment, and the soft cap of the scores.

    Attributes:
        before, after: number of tokens back and ahead that a query sees; None means all.
        softcap: scores become softcap * tanh(score / softcap).
    """

    before: int | None = None
    after: int | None = 0
    softcap: float | None = None

    def hides(self, length: int) -> bool:
        """Return True if any key of a segment of this length is hidden from any of its queries."""
        return any(reach is not None and reach < length - 1 for reach in (self.before, self.after))

    def visible(self, length: int, device: torch.device) -> torch.Tensor:
        """Bool [length, length]: query i sees key j."""
        token = torch.arange(length, device=device)
        ahead = token - token[:, None]
        visible = torch.ones_like(ahead, dtype=torch.bool)
        if self.before is not None:
            visible &= ahead >= -self.before
        if self.after is not None:
            visible &= ahead <= self.after
        return visible
