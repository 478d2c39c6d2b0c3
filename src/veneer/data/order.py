"""The order of the data as a pure function.

The order of the data is ``Order(n, seed).index(epoch, i)``: a permutation of range(n) for each epoch, computed without
being stored by a keyed Feistel network over the smallest even power of two that is at least n, iterated until the result
is in range(n) (Luby and Rackoff 1988 for the network, Black and Rogaway 2002 for the iteration). The position in the data
is therefore one integer, the cursor ``epoch * n + i``, and no random generator is used.
"""

from __future__ import annotations

from veneer.errors import DataError

_MASK64 = (1 << 64) - 1
_ROUNDS = 6


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
        # The network permutes a range of up to 4n; iterating until below n keeps it a permutation of range(n).
        while True:
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
