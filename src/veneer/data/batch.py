"""Flat batches: sequences behind each other, no padding, and an order that is a pure function.

Legend: T tokens of all segments together, S segments.

A batch of segments a (3 tokens) and b (2 tokens) is

    ids        a0 a1 a2 b0 b1
    positions   0  1  2  0  1
    offsets     0        3     5
    targets    a1 a2  . b1  .        (. is -100: the last token of a segment predicts nothing inside it)
    weights    w(a1) w(a2) 0 w(b1) 0

so ``weights[t]`` is the weight of predicting ``targets[t]`` at position t.

The order of the data is ``Order(n, seed).index(epoch, i)``: a permutation of range(n) for each epoch, computed and
never stored, from a keyed Feistel network over the smallest even power of two that holds n, walked until it is in
range(n) (Luby and Rackoff 1988 for the network, Black and Rogaway 2002 for the walk). One integer, the cursor
``epoch * n + i``, is therefore all the state that reading data has, and no random generator is touched.

Boundary: ``Batch`` knows the job of each segment, not what an adapter is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from veneer.data.example import Example
from veneer.errors import DataError

__all__ = ["IGNORE", "Batch", "Order", "make_batch"]

IGNORE = -100  # the target of a position that predicts nothing; torch's own ignore_index

_MASK64 = (1 << 64) - 1
_ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """Segments behind each other.

    Attributes:
        ids: [T] long, token ids.
        positions: [T] long, each segment counts from 0.
        offsets: [S+1] long, segment s is [offsets[s], offsets[s+1]).
        targets: [T] long, the next token inside the segment, -100 at a segment's last token.
        weights: [T] float32, loss weight of predicting ``targets[t]``; 0 where the target is -100.
        jobs: per segment, the job (adapter) that it belongs to.
        sources: per segment, "file:line".
    """

    ids: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    jobs: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return int(self.ids.numel())

    @property
    def trained(self) -> int:
        """The number of positions that the loss counts."""
        return int((self.weights > 0).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its per-token tensors on ``device``; ``offsets`` stay on the CPU, where they are read."""
        return Batch(
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            offsets=self.offsets,
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            jobs=self.jobs,
            sources=self.sources,
        )


def make_batch(examples: Sequence[Example], jobs: Sequence[str] | str) -> Batch:
    """Put examples behind each other, in the order given.

    Args:
        examples: at least one.
        jobs: the job of each example, or one job for all.

    Raises:
        DataError: no example, or as many jobs as there are not examples.
    """
    if not examples:
        raise DataError("A batch needs at least one example, found none.")
    owners = (jobs,) * len(examples) if isinstance(jobs, str) else tuple(jobs)
    if len(owners) != len(examples):
        raise DataError(f"Expected one job per example, found {len(examples)} examples and {len(owners)} jobs.")
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    offsets = [0]
    for example in examples:
        ids.extend(example.ids)
        positions.extend(range(len(example.ids)))
        targets.extend(example.ids[1:])
        targets.append(IGNORE)
        weights.extend(example.weights[1:])
        weights.append(0.0)
        offsets.append(len(ids))
    return Batch(
        ids=torch.tensor(ids, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        offsets=torch.tensor(offsets, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
        jobs=owners,
        sources=tuple(example.source for example in examples),
    )


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class Order:
    """The order in which n examples are read: a permutation for each epoch, from (seed, epoch, index) alone.

    >>> order = Order(5, seed=1)
    >>> sorted(order.index(0, i) for i in range(5))
    [0, 1, 2, 3, 4]
    >>> order.at(7) == order.index(1, 2)
    True
    """

    def __init__(self, n: int, seed: int = 0, *, shuffle: bool = True) -> None:
        if n < 1:
            raise DataError(f"An order needs at least one example, found {n}.")
        self.n = n
        self.seed = seed
        self.shuffle = shuffle
        self._half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._keys_of: tuple[int, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return self.n

    def index(self, epoch: int, i: int) -> int:
        """The example that stands at place ``i`` (0 <= i < n) of ``epoch``."""
        if not 0 <= i < self.n or epoch < 0:
            raise IndexError(f"place {i} of epoch {epoch} is outside {self.n} examples")
        if not self.shuffle:
            return i
        keys = self._keys(epoch)
        half, mask = self._half, (1 << self._half) - 1
        place = i
        while True:  # the network permutes a range up to four times n; walking on stays a permutation of range(n)
            left, right = place >> half, place & mask
            for key in keys:
                left, right = right, left ^ (_mix(key ^ right) & mask)
            place = (left << half) | right
            if place < self.n:
                return place

    def at(self, cursor: int) -> int:
        """The example at ``cursor``, which counts on through the epochs: cursor = epoch * n + i."""
        return self.index(*divmod(cursor, self.n))

    def _keys(self, epoch: int) -> tuple[int, ...]:
        if self._keys_of is None or self._keys_of[0] != epoch:
            root = _mix(_mix(self.seed & _MASK64) ^ _mix(epoch + 0x5851F42D))
            self._keys_of = (epoch, tuple(_mix(root + 0x9E3779B9 * r) for r in range(_ROUNDS)))
        return self._keys_of[1]
