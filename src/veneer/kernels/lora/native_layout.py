"""How a call of the low-rank kernels in C++ is laid out: its adapters, their layers, and where each one's numbers begin.

All that calls of one size have in common is made once, a `Layout`, and only read afterwards, so that threads may share it. What a single
call adds (tensors' addresses, dropped places, gradients) goes into a copy of the layers or into the `Call`. The structures are those of
``cpp/low_rank.cpp``, field by field.

Shapes: N tokens, K in, O out, R rank, padded to a multiple of 8.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.lora.branch import Factors, Layer

__all__ = ["Call", "LayerRow", "Layout", "Own", "Run", "RunRow", "covered"]

_UNIT = 8
"""Ranks are padded to a multiple of it."""
_LONG, _POINTER, _INT, _FLOAT = ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_float

Run = tuple["slice | None", "float | Tensor", "Sequence[Factors | None]"]
"""An adapter's tokens (None: all), its weight w (a float or [n]), and its factors at each layer, None where it leaves one alone."""


class LayerRow(ctypes.Structure):
    """One adapter at one layer."""

    _fields_ = [
        *((name, _LONG) for name in ("width", "rank", "at")),
        *((name, _POINTER) for name in ("a", "b", "gain", "w", "bias", "y", "out")),
        ("host", _LONG),
        *((name, _POINTER) for name in ("da", "db", "dots", "gone")),
        ("lost", _LONG),
        ("turned", _INT),
        ("scale", _FLOAT),
    ]


class RunRow(ctypes.Structure):
    """One adapter in a call, wherever the call's tensors lie."""

    _fields_ = [
        *((name, _LONG) for name in ("rows", "first", "columns", "layers", "layer", "memory", "u")),
        ("weights", _POINTER),
        ("weight", _FLOAT),
    ]


class Call(ctypes.Structure):
    """The tensors of a call, y and out by layer."""

    _fields_ = [
        *((name, _POINTER) for name in ("x", "dx", "memory", "u")),
        *((name, ctypes.POINTER(_POINTER)) for name in ("y", "out")),
        *((name, _INT) for name in ("packed", "joint")),
    ]


class Own:
    """One adapter in the call: where its tokens stand, its layers, and S where a gain acts."""

    def __init__(self, run: Run) -> None:
        self.rows, self.weight, self.factors = run
        self.parts = [(h, f) for h, f in enumerate(self.factors) if f is not None]
        self.gains = {h: gain.contiguous() for h, f in self.parts if (gain := f.gain()) is not None}
        self.drops = any(f.dropout is not None for _, f in self.parts)

    def span(self, cells: int) -> tuple[int, int]:
        """(first token, how many) of a call with so many."""
        first, last, _ = (slice(None) if self.rows is None else self.rows).indices(cells)
        return first, max(0, last - first)


def covered(owns: Sequence[Own], h: int, cells: int) -> bool:
    """Whether each of so many tokens has an adapter at layer h."""
    return cells == sum(own.span(cells)[1] for own in owns if own.factors[h] is not None)


class Layout:
    """All that calls of so many cells have in common, as the kernels take it: runs, and the layers of each behind the other's.

    It is only read once it is made, so threads may share it.
    """

    def __init__(self, layers: Sequence[Layer], owns: Sequence[Own], cells: int, *, whole: bool) -> None:
        self.runs = (RunRow * len(owns))()
        self.layers = (LayerRow * sum(len(own.parts) for own in owns))()
        self.alive: list[Tensor] = []
        """What addresses point to."""
        self.covered = [covered(owns, h, cells) for h in range(len(layers))]
        """Whether each token has an adapter, by layer."""
        self.memory = self.u = layer = 0
        for run, own in zip(self.runs, owns, strict=True):
            run.first, run.rows = own.span(cells)
            run.layer, run.layers, run.memory, run.u = layer, len(own.parts), self.memory, self.u
            self._weigh(run, own)
            for h, f in own.parts:
                self._lay(self.layers[layer], run, h, f, layers[h], own.gains.get(h), whole=whole)
                layer += 1
            self.u += run.columns * run.rows

    def _weigh(self, run: RunRow, own: Own) -> None:
        weight = own.weight / next((f.kept for _, f in own.parts), 1.0)
        if isinstance(weight, Tensor):
            self.alive.append(weight.to(torch.float32).contiguous())
            run.weights = self.alive[-1].data_ptr()
        else:
            run.weight = weight

    def _lay(
        self, own: LayerRow, run: RunRow, h: int, f: Factors, layer: Layer, gain: Tensor | None, *, whole: bool
    ) -> None:
        weight, bias = layer
        rank, width = len(f.a), len(f.b)
        own.host, own.lost = h, -1
        own.w, own.turned = weight.data_ptr() if whole else None, not weight.is_contiguous()
        own.bias = None if bias is None else bias.data_ptr()
        own.width, own.rank, own.at, own.scale = width, rank, run.columns, f.scale
        own.a, own.b, own.gain = f.a.data_ptr(), f.b.data_ptr(), None if gain is None else gain.data_ptr()
        padded = -(-rank // _UNIT) * _UNIT
        run.columns += padded
        self.memory += 2 * padded * (weight.shape[1] + width)

    def own_layers(self) -> Any:
        """A copy of the layers, for what one call alone adds to them."""
        return type(self.layers).from_buffer_copy(self.layers)
