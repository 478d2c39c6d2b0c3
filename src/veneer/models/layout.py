"""Flat batches, and the position of each of their tokens in the model's input.

    segments  [7 5 9] [4 4]      ids 7 5 9 4 4    positions 0 1 2 0 1    offsets 0 3 5

A model that runs flat batches sees one row of T tokens. One that runs padded rows sees S rows as long as the longest segment, some of
whose positions are padding.

Boundary: tensors of indices only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Flat", "FlatLike", "Layout", "PreparedBatch"]


class FlatLike(Protocol):
    """Anything with the three tensors of a flat batch: ``Flat`` itself, or a batch of training data."""

    @property
    def ids(self) -> torch.Tensor: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def offsets(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Flat:
    """A flat batch.

    Attributes:
        ids: [T] long, token ids.
        positions: [T] long, each segment counts from 0.
        offsets: [S + 1] long on the CPU; segment s is [offsets[s], offsets[s + 1]).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, segments: list[list[int]]) -> Flat:
        """From lists of token ids."""
        lengths = torch.tensor([0, *(len(segment) for segment in segments)])
        return cls(
            ids=torch.tensor([token for segment in segments for token in segment], dtype=torch.long),
            positions=torch.tensor([at for segment in segments for at in range(len(segment))], dtype=torch.long),
            offsets=lengths.cumsum(0),
        )


@dataclass(frozen=True)
class Layout:
    """The position of each token in the model's input.

    Attributes:
        shape: (1, T) flat, or (S, Tmax) in padded rows.
        index: [prod(shape)] long: the flat token of each cell, -1 for padding.
        cell: [T] long: the cell of each flat token, the inverse of ``index``.
    """

    shape: tuple[int, int]
    index: torch.Tensor
    cell: torch.Tensor

    @classmethod
    def flat(cls, batch: FlatLike) -> Layout:
        """One row, every cell a token."""
        index = torch.arange(batch.ids.numel())
        return cls((1, len(index)), index, index)

    @classmethod
    def padded(cls, batch: FlatLike) -> Layout:
        """A row for each segment, filled up at its end."""
        total = batch.ids.numel()
        lengths = batch.offsets.diff()
        rows, width = len(lengths), int(lengths.max()) if len(lengths) else 0
        row = torch.repeat_interleave(torch.arange(rows), lengths)
        cell = row * width + torch.arange(total) - batch.offsets[:-1][row]
        index = torch.full((rows * width,), -1, dtype=torch.long)
        index[cell] = torch.arange(total)
        return cls((rows, width), index, cell)


@dataclass(frozen=True)
class PreparedBatch(Flat):
    """A flat batch with its layout for one runner, computed once: `FlatRunner.prepare` makes it and every call of the runner takes it.

    ``ids`` and ``positions`` are on the model's device; the layout stays on the CPU, where it is read. ``types``: [T], 1 for tokens of the
    second of two texts; None where there is none.
    """

    layout: Layout
    types: torch.Tensor | None = None
