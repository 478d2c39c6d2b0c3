"""Flat batches (concatenated sequences without padding) and the order of the data as a pure function.

Legend: T tokens of all segments, S segments.

A batch of segments a (3 tokens) and b (2 tokens) is

    ids        a0 a1 a2 b0 b1
    positions   0  1  2  0  1
    offsets     0        3     5
    targets    a1 a2  . b1  .        (. is -100: the last token of a segment predicts nothing inside it)
    weights    w(a1) w(a2) 0 w(b1) 0

so ``weights[t]`` is the weight of predicting ``targets[t]`` at position t. The targets of examples with labels are their labels, as fp32.

The order of the data is ``Order(n, seed).index(epoch, i)``: a permutation of range(n) for each epoch, computed without
being stored by a keyed Feistel network over the smallest even power of two that is at least n, iterated until the result
is in range(n) (Luby and Rackoff 1988 for the network, Black and Rogaway 2002 for the iteration). The position in the data
is therefore one integer, the cursor ``epoch * n + i``, and no random generator is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from veneer.data.example import Example
from veneer.errors import DataError

__all__ = ["IGNORE", "Batch", "Order", "make_batch"]

IGNORE = -100  # the target of a position that predicts nothing; torch's own ignore_index

_MASK64 = (1 << 64) - 1
_ROUNDS = 6


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

    @property
    def trained(self) -> int:
        """The number of positions with a weight."""
        return int((self.weights > 0).sum())

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

    def to(self, device: torch.device | str) -> Batch:
        """Move the per-token tensors to ``device``; ``offsets`` stay on the CPU, where they are read."""
        return Batch(
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            offsets=self.offsets,
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            jobs=self.jobs,
            sources=self.sources,
            types=None if self.types is None else self.types.to(device),
            undesirable=self.undesirable,
        )


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


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijective hash of 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class Order:
    """The order in which n examples are read: a permutation per epoch, a function of (seed, epoch, index).

    >>> order = Order(5, seed=1)
    >>> sorted(order.index(0, i) for i in range(5))
    [0, 1, 2, 3, 4]
    >>> order.at(7) == order.index(1, 2)
    True
    """

    def __init__(self, n: int, seed: int = 0, *, shuffle: bool = True) -> None:
        if n < 1:
            raise DataError(f"an order needs at least one example, found {n}")
        self.n = n
        self.seed = seed
        self.shuffle = shuffle
        self._half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._keys_of: tuple[int, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return self.n

    def index(self, epoch: int, i: int) -> int:
        """The example at position ``i`` (0 <= i < n) of ``epoch``."""
        if not 0 <= i < self.n or epoch < 0:
            raise IndexError(f"position {i} of epoch {epoch} is out of range for {self.n} examples")
        if not self.shuffle:
            return i
        keys = self._keys(epoch)
        half, mask = self._half, (1 << self._half) - 1
        position = i
        while (
            True
        ):  # the network permutes a range of up to 4n; iterating until below n keeps it a permutation of range(n)
            left, right = position >> half, position & mask
            for key in keys:
                left, right = right, left ^ (_mix(key ^ right) & mask)
            position = (left << half) | right
            if position < self.n:
                return position

    def at(self, cursor: int) -> int:
        """The example at ``cursor`` = epoch * n + i."""
        return self.index(*divmod(cursor, self.n))

    def _keys(self, epoch: int) -> tuple[int, ...]:
        if self._keys_of is None or self._keys_of[0] != epoch:
            root = _mix(_mix(self.seed & _MASK64) ^ _mix(epoch + 0x5851F42D))
            self._keys_of = (epoch, tuple(_mix(root + 0x9E3779B9 * r) for r in range(_ROUNDS)))
        return self._keys_of[1]
