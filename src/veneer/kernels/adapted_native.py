"""All adapters' part in a fused adapted linear call, in C++ (``cpp/low_rank.cpp``): each adapter on a run of tokens of its own.

    forward     u = w x A^T,          y_h = S (W_h x) + b_h + u_h (s S B)_h^T
    backward    G = w [g_1 (s S B)_1 | g_2 (s S B)_2 | ...],      dx += G A,      dA = G^T x,      dB_h = s S u_h^T g_h

and sum_t g_h (y_h - b_h), from which m's gradient is made. The formulas are those of `adapted_share`, which is the reference. Each of
these products alone moves far more than it multiplies, and is slow in matrix libraries for that; here a block of tokens is read once
for all of them, one call does for all adapters and layers, and gradients come out in the masters' fp32 with nothing rounded between.
Rounded to the compute dtype are A, s S B, u and G.

In bf16, where the processor multiplies pairs of it and every token has an adapter, the products with the frozen weights are taken here
too (``cpp/products.h``), one for each layer and one for the gradient of the input, with S and the low-rank products inside.

Dropout hides some numbers of x from a layer's factors: products with A then take a copy of x, a block of tokens at a time, with zeros in
their places. The factor 1 / (1 - p) is part of w.

Not for scattered tokens, high ranks (where matrix libraries are as quick), or factors that are kept folded. Shapes: N tokens,
n an adapter's, K in, O out, R rank, padded to a multiple of 8 inside.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.adapted_parts import (
    Backward,
    Factors,
    Gradients,
    Layer,
    Reduction,
    by_magnitude,
    regain_cells_,
    take,
)
from veneer.kernels.adapted_share import Share
from veneer.kernels.native import KINDS, library
from veneer.kernels.product import longest_product

__all__ = ["Native", "Run", "agrees", "fits"]

_UNIT, _STEP = 8, 32
"""Ranks are padded to the first; widths are multiples of the second."""
_HIGHEST = {torch.float32: 16, torch.bfloat16: 32}
"""Ranks above which matrix libraries are as quick (docs/log.md)."""

_PLACES = 2**31 - 1
"""Places that dropout hides are told as numbers up to this."""

Run = tuple["slice | None", "float | Tensor", "Sequence[Factors | None]"]
"""An adapter's tokens (None: all), its weight w (a float or [n]), and its factors at each layer, None where it leaves one alone."""


class _Layer(ctypes.Structure):
    _fields_ = [
        ("width", ctypes.c_long),
        ("rank", ctypes.c_long),
        ("at", ctypes.c_long),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("da", ctypes.c_void_p),
        ("db", ctypes.c_void_p),
        ("dots", ctypes.c_void_p),
        ("gone", ctypes.c_void_p),
        ("lost", ctypes.c_long),
        ("scale", ctypes.c_float),
    ]


class _Part(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_long),
        ("columns", ctypes.c_long),
        ("layers", ctypes.c_long),
        ("layer", ctypes.POINTER(_Layer)),
        ("x", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("u", ctypes.c_void_p),
        ("dx", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("weight", ctypes.c_float),
    ]


def fits(layers: Sequence[Layer], factors: Sequence[Factors | None] = (), numbers: int = 0) -> bool:
    """Whether an adapter's part at these layers can be computed in C++ here and now; without factors, whether any could.

    numbers: how many the input has.
    """
    weight = layers[0][0]
    if library() is None or weight.dtype not in KINDS or weight.device.type != "cpu" or weight.shape[1] % _STEP:
        return False
    # A bias of another width is for torch to refuse; addresses tell nothing of it.
    if any(bias is not None and not (bias.dtype == weight.dtype and bias.is_contiguous()) for _, bias in layers):
        return False
    there = [f for f in factors if f is not None]
    if numbers > _PLACES and any(f.dropout is not None for f in there):
        return False
    return all(_knows(f, _HIGHEST[weight.dtype]) for f in there) and len({f.kept for f in there}) <= 1


def _knows(f: Factors, highest: int) -> bool:
    wide = f.a.dtype == f.b.dtype == torch.float32 and (f.norm is None or f.norm.dtype == torch.float32)
    laid = f.a.is_contiguous() and f.b.is_contiguous() and len(f.b) % _STEP == 0
    return wide and laid and f.folded is None and len(f.a) <= highest


def agrees() -> bool:
    """Whether the kernels, as built here, compute what the plain form does, on random numbers."""
    draw = torch.Generator().manual_seed(0)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        shapes = ((64, 3), (32, 9))
        factors = [
            Factors(torch.randn(r, 32, generator=draw), torch.randn(o, r, generator=draw), 0.5) for o, r in shapes
        ]
        x = torch.randn(70, 32, generator=draw).to(dtype)
        layers: tuple[Layer, ...] = tuple((torch.randn(o, 32, generator=draw).to(dtype), None) for o, _ in shapes)
        g: list[Tensor | None] = [torch.randn(70, o, generator=draw).to(dtype) for o, _ in shapes]
        found = []
        for branch in (Native(layers, [(None, 0.7, factors)]), Share(None, 0.7, factors)):
            branch.whole(len(x))  # the products with the weights are in it then, and written over what stands here
            y = [x @ weight.T for weight, _ in layers]
            dx = sum(
                (slope @ w for slope, (w, _) in zip(g, layers, strict=True) if slope is not None), torch.zeros_like(x)
            )
            kept = branch.run_(x, y)
            slopes = branch.gradients_(Backward(layers, x, [None, None], g, dx), kept)
            found.append([t.double() for t in (*y, dx, *slopes) if t is not None])
        if not all((a - b).norm() <= bound * b.norm() for a, b in zip(*found, strict=True)):
            return False
    return True


class _Own:
    """One adapter in the call: where its tokens stand, its layers, its columns of u, and their addresses."""

    def __init__(self, layers: Sequence[Layer], run: Run) -> None:
        self.rows, self.weight, factors = run
        self.parts = [(h, f) for h, f in enumerate(factors) if f is not None]
        self.gains = {h: gain.contiguous() for h, f in self.parts if (gain := f.gain()) is not None}
        self.weight = self.weight / next((f.kept for _, f in self.parts), 1.0)
        self.layers = (_Layer * len(self.parts))()
        self.columns = self.size = 0
        for own, (h, f) in zip(self.layers, self.parts, strict=True):
            (rank, _), width = f.a.shape, len(f.b)
            gain, (weight, bias) = self.gains.get(h), layers[h]
            own.bias = None if bias is None else bias.data_ptr()
            own.width, own.rank, own.at, own.scale = width, rank, self.columns, f.scale
            own.a, own.b, own.gain = f.a.data_ptr(), f.b.data_ptr(), None if gain is None else gain.data_ptr()
            padded = -(-rank // _UNIT) * _UNIT
            self.columns += padded
            self.size += 2 * padded * (weight.shape[1] + width)

    def span(self, cells: int) -> tuple[int, int]:
        """(first token, how many) of a call with so many."""
        first, last, _ = (slice(None) if self.rows is None else self.rows).indices(cells)
        return first, max(0, last - first)

    def hide(self, gone: Sequence[Tensor | None]) -> None:
        """Tell each layer the places that dropout hides from it."""
        for layer, places in zip(self.layers, gone, strict=True):
            layer.gone, layer.lost = (None, -1) if places is None else (places.data_ptr(), len(places))


class Native:
    """Adapters that share no token, as one branch."""

    scales = True

    def __init__(self, layers: Sequence[Layer], runs: Sequence[Run]) -> None:
        self._owns = [_Own(layers, run) for run in runs]
        self._layers = layers
        self._columns = layers[0][0].shape[1]
        self._whole = False
        self._made = library()
        """Kept, so that a backward ends as its forward began, whatever is in use by then."""
        self.masters: list[Tensor | None] = [m for own in self._owns for _, f in own.parts for m in f.masters]

    def whole(self, cells: int) -> bool:
        """Whether `run_` and `gradients_` take the products with the layers' weights too: every token is an adapter's, at every layer."""
        weights = [weight for weight, _ in self._layers]
        most = longest_product() if weights[0].dtype == torch.bfloat16 else 0
        fits = max(self._columns, sum(map(len, weights))) <= most and all(w.is_contiguous() for w in weights)
        everywhere = all(len(own.parts) == len(weights) for own in self._owns)
        self._whole = fits and everywhere and cells == sum(own.span(cells)[1] for own in self._owns)
        return self._whole

    def gained(self, h: int) -> bool:
        """Whether a gain acts at layer h."""
        return any(h in own.gains for own in self._owns)

    def whole_gain(self, h: int) -> Tensor | None:
        """S [O] at layer h, if it acts on every cell."""
        first = self._owns[0]
        return first.gains.get(h) if len(self._owns) == 1 and first.rows is None else None

    def regain_(self, h: int, t_NO: Tensor, bias_O: Tensor | None) -> None:
        """S (t - b) + b on each adapter's cells, in place."""
        for own in self._owns:
            if (gain := own.gains.get(h)) is not None:
                regain_cells_(t_NO, own.rows, gain, bias_O)

    def run_(self, x_NK: Tensor, y_NO: Sequence[Tensor]) -> list[Tensor | None]:
        """Multiply the outputs by S, and add the low-rank products. Keeps the factors as they were computed with, u, and dropped places."""
        x = x_NK.contiguous()
        spans = [own.span(len(x)) for own in self._owns]
        memory = x.new_empty(sum(own.size for own in self._owns))
        u = x.new_empty(sum(own.columns * n for own, (_, n) in zip(self._owns, spans, strict=True)))
        gone: list[Tensor | None] = []
        for own, (first, count) in zip(self._owns, spans, strict=True):
            gone += [f.places(count * self._columns, x.device) for _, f in own.parts]
            own.hide(gone[len(gone) - len(own.parts) :])
            for layer, (h, _) in zip(own.layers, own.parts, strict=True):
                layer.y = _at(y_NO[h], first)
                layer.w = self._layers[h][0].data_ptr() if self._whole else None
        self._call("veneer_low_rank_forward", x, spans, memory, u, None)
        return [memory, u, *gone]

    def gradients_(self, back: Backward, kept: Sequence[Tensor | None]) -> Gradients:
        """Gradients of the masters, three a layer; dx is added to in place."""
        memory, u, *gone = kept
        assert memory is not None and u is not None
        g_NO = [None if g is None else g.contiguous() for g in back.g_NO]
        cells = next((len(g) for g in g_NO if g is not None), 0)
        x = None if back.x_NK is None else back.x_NK.contiguous()
        spans = [own.span(cells) for own in self._owns]
        make = torch.empty_like if cells else torch.zeros_like
        found: Gradients = []
        dots: list[tuple[int, int, Factors, _Own, Tensor, Tensor | None]] = []
        low = 0
        for own, (first, count) in zip(self._owns, spans, strict=True):
            own.hide([gone.pop(0) for _ in own.parts])
            u_nR = u[low : low + count * own.columns].view(count, own.columns)
            low += count * own.columns
            for layer, (h, f) in zip(own.layers, own.parts, strict=True):
                g, y, gain = g_NO[h], back.y_NO[h], own.gains.get(h)
                da = None if x is None else make(f.a)
                db = None if x is None or g is None else make(f.b)
                layer.y = None if g is None else _at(g, first)
                layer.da, layer.db = (None if d is None else d.data_ptr() for d in (da, db))
                layer.out = layer.dots = None
                if x is not None and g is not None and y is not None and gain is not None:
                    seen = None if f.dropout is None else u_nR[:, layer.at : layer.at + layer.rank]
                    dots.append((len(found) + 2, h, f, own, make(gain), seen))
                    layer.out, layer.dots = _at(y, first), dots[-1][4].data_ptr()
                found += [da, db, None]
        if cells:
            self._call("veneer_low_rank_backward", x, spans, memory, u, back.dx_NK)
        for place, h, f, own, dots_O, seen in dots:
            g, y = g_NO[h], back.y_NO[h]
            assert x is not None and g is not None and y is not None
            g_nO, y_nO, x_nK = (take(t, own.rows) for t in (g, y, x))
            reduction = Reduction(back.layers[h], f, own.gains[h], g_nO, y_nO, x_nK, seen)
            found[place] = by_magnitude(reduction, dots_O)
        return found

    def _call(
        self,
        name: str,
        x: Tensor | None,
        spans: list[tuple[int, int]],
        memory: Tensor,
        u: Tensor,
        dx: Tensor | None,
    ) -> None:
        parts = (_Part * len(spans))()
        size, alive = memory.element_size(), []
        packed, low = memory.data_ptr(), u.data_ptr()
        for part, own, (first, count) in zip(parts, self._owns, spans, strict=True):
            part.rows, part.columns, part.layers, part.layer = count, own.columns, len(own.layers), own.layers
            part.x, part.dx = (None if t is None else _at(t, first) for t in (x, dx))
            part.memory, part.u = packed, low
            packed += own.size * size
            low += own.columns * count * size
            if isinstance(own.weight, Tensor):
                alive.append(own.weight.to(torch.float32).contiguous())
                part.weights = alive[-1].data_ptr()
            else:
                part.weight = own.weight
        sizes = ctypes.c_long(self._columns), ctypes.c_long(len(parts))
        getattr(self._made, name)(KINDS[memory.dtype], sizes[0], parts, sizes[1], torch.get_num_threads())


def _at(t_NX: Tensor, first: int) -> int:
    """The address of a row."""
    return t_NX.data_ptr() + first * t_NX.shape[1] * t_NX.element_size()
