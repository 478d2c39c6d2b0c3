"""Dropout whose mask is a function of a seed alone.

    drop(x) = x * keep / (1 - p),   keep ~ Bernoulli(1 - p), independent per element

Element i is dropped if its random number of 16 bits is below 65536 p. Four numbers are the parts of one word: SplitMix64's function
(Steele, Lea and Flood, 2014) of the seed and i // 4. So any part of a mask is computed alone, no global random state is read, and every
device drops the same elements. ``mask`` is the reference, and runs where the input is. ``cpp/dropout.cpp`` lists the dropped elements of
a CPU's inputs in a tenth of its time.

p is rounded to a multiple of 1 / 65536.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.cpp_library import function, library

__all__ = ["Dropout", "drop", "mask", "places", "zero_"]

_BITS = 64
_ALL = (1 << _BITS) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LANES = 4
"""Random numbers in a word."""
_WORDS = {"cpu": 1 << 13, "cuda": 1 << 22}
"""Words that are computed at a time: those that fit the cache, or 32 MiB of a GPU's memory."""
_DROPPED = (*[ctypes.c_long] * 2, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_long)


class Dropout(NamedTuple):
    """Dropout of an adapter's input: its probability and its seed.

    window: (first, rows, total) where the input is rows [first, first + rows) of one of ``total`` rows, whose mask it shares.
    """

    p: float
    seed: int
    window: tuple[int, int, int] | None = None

    def begin(self, count: int) -> int:
        """The position of the first of ``count`` elements in the whole mask."""
        if self.window is None:
            return 0
        first, rows, _ = self.window
        return first * (count // rows) if rows else 0


def mask(count: int, dropout: Dropout, device: torch.device | str = "cpu") -> Tensor:
    """True where one of ``count`` elements is dropped, bool [count]."""
    target = torch.device(device)
    where = target if target.type in _WORDS else torch.device("cpu")
    limit, start, begin = _limit(dropout.p), _signed(_mixed(dropout.seed)), dropout.begin(count)
    skip = begin % _LANES
    found = torch.empty(count + skip, dtype=torch.bool, device=where)
    words, at_once = -(-len(found) // _LANES), _WORDS[where.type]
    for at in range(0, words, at_once):
        numbers = _words(begin // _LANES + at, min(at_once, words - at), start, where).view(torch.int16)
        part = found[_LANES * at : _LANES * at + len(numbers)]
        torch.lt(numbers[: len(part)], limit, out=part)
    return found[skip:].to(target)


def places(count: int, dropout: Dropout, device: torch.device | str = "cpu") -> Tensor:
    """The dropped ones of ``count`` elements: on a CPU their ascending indices, in int32 if they fit; elsewhere a mask.

    A mask takes a GPU no wait for their number.
    """
    if torch.device(device).type != "cpu":
        return mask(count, dropout, device)
    made = library()
    if made is None or count >= 2**30:
        indices = mask(count, dropout).nonzero().squeeze(1)
        return indices.to(torch.int32) if count < 2**31 else indices
    call = function(made, "veneer_dropped", _DROPPED, ctypes.c_long)
    # Six standard deviations more than expected: one draw in a thousand million needs more room.
    room = int(count * dropout.p + 6 * math.sqrt(count * dropout.p) + 16)
    while True:
        found = torch.empty(room, dtype=torch.int32)
        numbers = (dropout.begin(count), count, _mixed(dropout.seed), _limit(dropout.p))
        number = call(*numbers, found.data_ptr(), room)
        if number <= room:
            return found[:number]
        room = number


def zero_(x: Tensor, hidden: Tensor) -> Tensor:
    """Set the ``places`` of a contiguous tensor to zero, in place."""
    flat = x.view(-1)
    if hidden.dtype == torch.bool:
        flat.masked_fill_(hidden, 0)
    else:
        flat.index_fill_(0, hidden.long(), 0)
    return x


def drop(x: Tensor, p: float, seed: int, window: tuple[int, int, int] | None = None) -> Tensor:
    """Dropout of a whole tensor: plain form, differentiable."""
    hidden = mask(x.numel(), Dropout(p, seed, window), x.device)
    return (x.reshape(-1).masked_fill(hidden, 0) / (1 - p)).view(x.shape)


def _words(first: int, count: int, start: int, device: torch.device) -> Tensor:
    """Words ``first`` and following, int64 [count]. Products and sums of int64 wrap, as those of unsigned numbers do."""
    x = torch.arange(first, first + count, device=device)
    x.mul_(_signed(_STEP)).add_(start)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        # The shift of a negative number brings in ones.
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (_BITS - shift)) - 1))
        if factor != 1:
            x.mul_(_signed(factor))
    return x


def _mixed(seed: int) -> int:
    """The same function of one number, so that neighbouring seeds begin far from each other."""
    x = seed & _ALL
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        x = (x ^ (x >> shift)) * factor & _ALL
    return x


def _limit(p: float) -> int:
    """The bound below which a signed number of 16 bits is dropped."""
    return min(round(p * 65536), 65535) - 32768


def _signed(x: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return x - (1 << _BITS) if x >> (_BITS - 1) else x
