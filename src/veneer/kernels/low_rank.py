"""The low-rank branch of one adapter at the layers that read one input, in C++ (``cpp/low_rank.cpp``).

    forward     u = w x A^T,          y_h += u_h B_h^T
    backward    G = w [g_1 B_1 | g_2 B_2 | ...],      dx += G A,      dA = G^T x,      dB_h = s S u_h^T g_h

with B_h = s S b_h, as `adapted_share` has them: the formulas in torch there are the reference. Each product alone moves far more than it
multiplies; here a block of tokens is read once for all of them, and gradients come out in the masters' fp32 with no rounding between.
What is rounded to the compute dtype: A, B, u and G.

Shapes: N tokens, K in, O_h out of layer h, R rank; ranks are padded to multiples of 8 inside.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.adapted_parts import Factors
from veneer.kernels.native import library

__all__ = ["LowRank", "low_rank"]

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_UNIT, _STEP, _HIGHEST = 8, 32, 32
"""Ranks are padded to the first; widths are multiples of the second. Above the third matrix libraries are as quick."""


class _Layer(ctypes.Structure):
    _fields_ = [
        ("width", ctypes.c_long),
        ("rank", ctypes.c_long),
        ("at", ctypes.c_long),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("scale", ctypes.c_float),
    ]


def low_rank(x_NK: Tensor, factors: Sequence[Factors], gains: Sequence[Tensor | None]) -> LowRank | None:
    """The branch in C++, or None where it is not for such an input or such factors. gains: S [O_h] or None, per layer."""
    made = library()
    if made is None or x_NK.dtype not in _KINDS or x_NK.device.type != "cpu" or x_NK.shape[1] % _STEP:
        return None
    for f, gain in zip(factors, gains, strict=True):
        if f.a.dtype != torch.float32 or f.b.dtype != torch.float32 or len(f.a) > _HIGHEST or len(f.b) % _STEP:
            return None
        if not (f.a.is_contiguous() and f.b.is_contiguous()) or (gain is not None and gain.dtype != torch.float32):
            return None
    return LowRank(made, x_NK, factors, gains)


class LowRank:
    """Sizes and addresses of one call, for its forward and its backward."""

    def __init__(
        self, made: ctypes.CDLL, x_NK: Tensor, factors: Sequence[Factors], gains: Sequence[Tensor | None]
    ) -> None:
        self._made = made
        self._kind = _KINDS[x_NK.dtype]
        self._factors = factors
        self._gains = [None if gain is None else gain.contiguous() for gain in gains]
        self._layers = (_Layer * len(factors))()
        at = size = 0
        for own, f, gain in zip(self._layers, factors, self._gains, strict=True):
            own.width, own.rank, own.at = len(f.b), len(f.a), at
            own.a, own.b, own.gain = f.a.data_ptr(), f.b.data_ptr(), None if gain is None else gain.data_ptr()
            own.scale = f.scale
            padded = -(-len(f.a) // _UNIT) * _UNIT
            at += padded
            size += 2 * padded * (x_NK.shape[1] + len(f.b))
        self._rank, self._size = at, size

    def forward_(
        self, x_NK: Tensor, weight: float | Tensor, y_NO: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Add to the outputs in place. Returns what `backward_` needs: the factors as they were computed with, and u."""
        memory = x_NK.new_empty(self._size)
        u_NR = x_NK.new_empty(len(x_NK), self._rank)
        row, one = _weights(weight)
        self._made.veneer_low_rank_forward(
            self._kind,
            _pointer(x_NK),
            *map(ctypes.c_long, x_NK.shape),
            self._layers,
            len(self._layers),
            _pointer(memory),
            _pointer(row),
            one,
            _pointers(y_NO),
            _pointer(u_NR),
            torch.get_num_threads(),
        )
        return memory, u_NR

    def backward_(
        self,
        x_NK: Tensor | None,
        weight: float | Tensor,
        g_NO: Sequence[Tensor | None],
        kept: tuple[Tensor, Tensor],
        dx_NK: Tensor | None,
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """(dA, dB) per layer, None where x is (nothing is trained) and dB where no gradient came; dx is added to in place."""
        memory, u_NR = kept
        found: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(self._factors)
        if x_NK is not None:
            pairs = zip(self._factors, g_NO, strict=True)
            found = [(torch.empty_like(f.a), None if g is None else torch.empty_like(f.b)) for f, g in pairs]
        row, one = _weights(weight)
        columns = self._factors[0].a.shape[1]
        self._made.veneer_low_rank_backward(
            self._kind,
            _pointer(x_NK),
            ctypes.c_long(len(u_NR)),
            ctypes.c_long(columns),
            self._layers,
            len(self._layers),
            _pointer(memory),
            _pointer(row),
            one,
            _pointers(g_NO),
            _pointer(u_NR),
            _pointer(dx_NK),
            _pointers([da for da, _ in found]),
            _pointers([db for _, db in found]),
            torch.get_num_threads(),
        )
        return found


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _weights(weight: float | Tensor) -> tuple[Tensor | None, ctypes.c_float]:
    """(a weight per token in fp32, one for all)."""
    if isinstance(weight, Tensor):
        return weight.to(torch.float32).contiguous(), ctypes.c_float(1.0)
    return None, ctypes.c_float(weight)
