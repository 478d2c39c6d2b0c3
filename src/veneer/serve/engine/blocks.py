"""Cache blocks: which are free, who uses them, and which hold a prefix that another sequence may reuse. No tensors.

A block holds the keys and values of a fixed number of tokens. A full block is known by its content: the digest of everything before it,
which begins with the base, the adapters' hashes and weights, and its own tokens, which are compared on a hit. A block that nobody uses
stays known until its place is needed; the one that was left longest ago goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Digest = bytes


def root_digest(*parts: object) -> Digest:
    """The digest that a sequence's first block follows: whatever the keys and values depend on beside the tokens."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def next_digest(parent: Digest, tokens: Sequence[int]) -> Digest:
    """The digest behind a block of ``tokens``."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Blocks 0 to ``count`` - 1 of ``size`` tokens each."""

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self._users = [0] * count
        self._empty = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Known blocks without users, the one left longest ago first."""
        self._known: dict[tuple[Digest, tuple[int, ...]], int] = {}
        self._keys: list[tuple[Digest, tuple[int, ...]] | None] = [None] * count

    @property
    def free(self) -> int:
        """Number of blocks that can be allocated."""
        return len(self._empty) + len(self._idle)

    @property
    def cached(self) -> int:
        """Number of blocks that are known by their content."""
        return len(self._known)

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that hold so many tokens."""
        return -(-tokens // self.size)

    def allocate(self, count: int) -> list[int] | None:
        """Blocks of unknown content for one user; None if there are not so many."""
        if count > self.free:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._users[block] = 1
        return block

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._known[key]
            self._keys[block] = None

    def match(self, root: Digest, tokens: Sequence[int]) -> tuple[list[int], list[Digest]]:
        """The longest run of known blocks at the beginning of ``tokens``, which the caller now uses, and the digests behind them."""
        blocks: list[int] = []
        digests: list[Digest] = []
        parent = root
        for start in range(0, len(tokens) - self.size + 1, self.size):
            own = tuple(tokens[start : start + self.size])
            block = self._known.get((parent, own))
            if block is None:
                break
            self._use(block)
            blocks.append(block)
            parent = next_digest(parent, own)
            digests.append(parent)
        return blocks, digests

    def _use(self, block: int) -> None:
        if self._users[block] == 0:
            del self._idle[block]
        self._users[block] += 1

    def publish(self, block: int, parent: Digest, tokens: Sequence[int]) -> Digest:
        """Make a full block known by its content; returns the digest behind it. Content that is known already stays where it is."""
        own = tuple(tokens)
        key = (parent, own)
        if key not in self._known and self._keys[block] is None:
            self._known[key] = block
            self._keys[block] = key
        return next_digest(parent, own)

    def release(self, blocks: Sequence[int]) -> None:
        """Give up the use of blocks. The last ones of a sequence are forgotten first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                if self._keys[block] is None:
                    self._empty.append(block)
                else:
                    self._idle[block] = None
