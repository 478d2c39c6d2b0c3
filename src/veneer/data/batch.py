"""Flat batches: concatenated sequences without padding.

Legend: T tokens of all segments, S segments.

A batch of segments a (3 tokens) and b (2 tokens) is

    ids        a0 a1 a2 b0 b1
    positions   0  1  2  0  1
    offsets     0        3     5
    targets    a1 a2  . b1  .        (. is -100: the last token of a segment predicts nothing inside it)
    weights    w(a1) w(a2) 0 w(b1) 0

so ``weights[t]`` is the weight of predicting ``targets[t]`` at position t. The targets of examples with labels are their labels, as fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import torch

from veneer.data.example import Example
from veneer.errors import DataError

__all__ = ["IGNORE", "Batch", "make_batch", "packed"]

T = TypeVar("T")
IGNORE = -100  # the target of a position that predicts nothing; torch's own ignore_index


@dataclass(frozen=True)
class Batch:
    """Concatenated segments.

    Attributes:
        ids: [T] long, token ids.
        positions: [T] long, starting at 0 in each segment.
        offsets: [S+1] long, segment s covers [offsets[s], offsets[s+1]).
        targets: [T] long, the next token inside the segment, -100 at a segment's last token; [T] float32 of examples with labels.
        weights: [T] float32, loss weight of predicting ``targets[t]``; 0 where the target is -100.
        jobs: the job (adapter) of each segment.
        sources: "file:line" of each segment.
        types: [T] long, 1 for tokens of the second of two texts; None where every segment is one text.
        undesirable: the segments with answers that the model is to avoid.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    jobs: tuple[str, ...]
    sources: tuple[str, ...]
    types: torch.Tensor | None = None
    undesirable: frozenset[int] = frozenset()

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return int(self.ids.numel())

    def select(self, segments: Sequence[int]) -> Batch:
        """The batch of these segments alone, in the given order."""
        spans = [(int(self.offsets[s]), int(self.offsets[s + 1])) for s in segments]
        index = torch.cat([torch.arange(a, b) for a, b in spans])
        return Batch(
            ids=self.ids[index],
            positions=self.positions[index],
            offsets=torch.tensor([0, *accumulate(b - a for a, b in spans)]),
            targets=self.targets[index],
            weights=self.weights[index],
            jobs=tuple(self.jobs[s] for s in segments),
            sources=tuple(self.sources[s] for s in segments),
            types=None if self.types is None else self.types[index],
            undesirable=frozenset(at for at, s in enumerate(segments) if s in self.undesirable),
        )

    def prepend(self, tokens: Sequence[int], shifts: Sequence[int]) -> Batch:
        """The batch with virtual tokens before its segments.

        Args:
            tokens: for each segment, the number of tokens without a target that are put before it, with the id 0.
            shifts: for each segment, the position at which it begins.
        """
        ids, positions, targets, weights, types, ends = [], [], [], [], [], [0]
        given = torch.zeros_like(self.ids) if self.types is None else self.types
        for s, (n, shift) in enumerate(zip(tokens, shifts, strict=True)):
            own = slice(int(self.offsets[s]), int(self.offsets[s + 1]))
            ids += [self.ids.new_zeros(n), self.ids[own]]
            positions.append(torch.arange(shift, shift + n + own.stop - own.start))
            targets += [self.targets.new_full((n,), IGNORE), self.targets[own]]
            weights += [self.weights.new_zeros(n), self.weights[own]]
            types += [given.new_zeros(n), given[own]]
            ends.append(ends[-1] + n + own.stop - own.start)
        return replace(
            self,
            ids=torch.cat(ids),
            positions=torch.cat(positions),
            offsets=torch.tensor(ends),
            targets=torch.cat(targets),
            weights=torch.cat(weights),
            types=None if self.types is None else torch.cat(types),
        )


def packed(items: Iterable[T], tokens: int, size: Callable[[T], int] = len) -> Iterator[list[T]]:  # type: ignore[assignment]
    """Consecutive items in lists of at most ``tokens`` tokens; a longer item gets its own list.

    size: the number of tokens of an item.
    """
    group: list[T] = []
    used = 0
    for item in items:
        if group and used + size(item) > tokens:
            yield group
            group, used = [], 0
        group.append(item)
        used += size(item)
    if group:
        yield group


def make_batch(examples: Sequence[Example], jobs: Sequence[str] | str) -> Batch:
    """Concatenate examples in the given order; each sequence of an example is a segment.

    Args:
        examples: at least one.
        jobs: the job of each example, or one job for all.

    Raises:
        DataError: there is no example, the number of jobs differs from that of examples, or only some examples have labels.
    """
    if not examples:
        raise DataError("a batch needs at least one example, found none")
    owners = (jobs,) * len(examples) if isinstance(jobs, str) else tuple(jobs)
    if len(owners) != len(examples):
        raise DataError(f"expected one job per example, found {len(examples)} examples and {len(owners)} jobs")
    labelled = bool(examples[0].labels)
    if any(bool(example.labels) != labelled for example in examples):
        raise DataError("a batch holds examples with labels or examples without, not both; train them in separate runs")
    ids: list[int] = []
    positions: list[int] = []
    targets: list[float] = []
    weights: list[float] = []
    offsets = [0]
    segments = [
        (sequence, job) for example, job in zip(examples, owners, strict=True) for sequence in example.sequences
    ]
    for sequence, _ in segments:
        ids.extend(sequence.ids)
        positions.extend(range(len(sequence.ids)))
        targets.extend(sequence.labels if labelled else (*sequence.ids[1:], IGNORE))
        weights.extend(sequence.weights if labelled else (*sequence.weights[1:], 0.0))
        offsets.append(len(ids))
    return Batch(
        ids=torch.tensor(ids, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        offsets=torch.tensor(offsets, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.float32 if labelled else torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
        jobs=tuple(job for _, job in segments),
        sources=tuple(sequence.source for sequence, _ in segments),
        types=_types(examples),
        undesirable=frozenset(s for s, (sequence, _) in enumerate(segments) if not sequence.desirable),
    )


def _types(examples: Sequence[Example]) -> torch.Tensor | None:
    if not any(example.second for example in examples):
        return None
    return torch.tensor(
        [int(0 < example.second <= at) for example in examples for at in range(len(example.ids))], dtype=torch.long
    )
