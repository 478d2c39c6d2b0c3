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

Not for scattered tokens or high ranks (where matrix libraries are as quick). Shapes: N tokens,
n an adapter's, K in, O out, R rank, padded to a multiple of 8 inside.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.cpp_library import KINDS, library
from veneer.kernels.frozen_linear import longest_product
from veneer.kernels.lora.branch import (
    Backward,
    Factors,
    Gradients,
    Layer,
    Reduction,
    by_magnitude,
    regain_cells_,
    take,
)
from veneer.kernels.lora.native_layout import Call, Layout, Own, Run, covered
from veneer.kernels.lora.single import Share

__all__ = ["Native", "Run", "agrees", "fits"]

_STEP = 32
"""Widths are multiples of it."""
_HIGHEST = {torch.float32: 16, torch.bfloat16: 64}
"""Ranks above which matrix libraries are as quick (docs/log.md)."""

_SIZES = 8
"""Layouts for calls of so many sizes are kept."""
_MANY = 16
"""Tokens an adapter from which on products of weights are quicker here for each by itself; packing a panel of a weight costs that much."""
_PLACES = 2**31 - 1
"""Places that dropout hides are told as numbers up to this."""


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
    return wide and laid and len(f.a) <= highest


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


class Native:
    """Adapters that share no token, as one branch.

    lasting: whether the factors stay as they are for as long as this branch is used, so that they are packed once.
    """

    scales = True

    def __init__(self, layers: Sequence[Layer], runs: Sequence[Run], *, lasting: bool = False) -> None:
        self._owns = [Own(run) for run in runs]
        self._layers = layers
        self._columns = layers[0][0].shape[1]
        self._layouts: dict[int, Layout] = {}
        self._wholes: dict[int, bool] = {}
        """What `whole` said; a call with other branches beside this one does not ask, and takes no products here."""
        self._lasting = lasting
        self._packed: Tensor | None = None
        self._gained = {h for own in self._owns for h in own.gains}
        self._drops = any(own.drops for own in self._owns)
        self._made = library()
        """Kept, so that a backward ends as its forward began, whatever is in use by then."""
        self.masters: list[Tensor | None] = [m for own in self._owns for _, f in own.parts for m in f.masters]

    def whole(self, cells: int) -> bool:
        """Whether `run_` and `gradients_` take the products with the layers' weights too: every token is an adapter's, at every layer."""
        if cells in self._wholes:
            return self._wholes[cells]
        weights = [weight for weight, _ in self._layers]
        most = longest_product() if weights[0].dtype == torch.bfloat16 else 0
        fits = max(self._columns, sum(map(len, weights))) <= most
        fits = fits and all(w.is_contiguous() or (w.T.is_contiguous() and not self._gained) for w in weights)
        fits = fits and (self._lasting or not self._sparse(cells))
        if len(self._wholes) >= _SIZES:
            self._wholes.clear()
        self._wholes[cells] = fits and all(covered(self._owns, h, cells) for h in range(len(weights)))
        return self._wholes[cells]

    def _sparse(self, cells: int) -> bool:
        """Whether adapters have too few tokens each for products with weights of their own."""
        return cells < _MANY * len(self._owns)

    def covers(self, h: int, cells: int) -> bool:
        """Whether every token has an adapter at layer h."""
        return self._layout(cells).covered[h]

    def gained(self, h: int) -> bool:
        """Whether a gain acts at layer h."""
        return h in self._gained

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
        layout = self._layout(len(x))
        packed = self._packed
        memory = x.new_empty(layout.memory) if packed is None else packed
        u = x.new_empty(layout.u)
        gone = self._places(layout, x.device)
        layers = self._hidden(layout, gone)
        joint = self._wholes.get(len(x), False) and self._sparse(len(x))
        call = Call(packed=packed is not None, joint=joint)
        self._call("veneer_low_rank_forward", layout, layers, call, x, None, memory, u, y_NO)
        if self._lasting:
            self._packed = memory
        return [memory, u, *gone]

    def gradients_(self, back: Backward, kept: Sequence[Tensor | None]) -> Gradients:
        """Gradients of the masters, three a layer; dx is added to in place."""
        memory, u, *gone = kept
        assert memory is not None and u is not None
        g_NO = [None if g is None else g.contiguous() for g in back.g_NO]
        cells = next((len(g) for g in g_NO if g is not None), 0)
        x = None if back.x_NK is None else back.x_NK.contiguous()
        layout = self._layout(cells)
        layers = self._hidden(layout, gone) if self._drops else layout.own_layers()
        make = torch.empty_like if cells else torch.zeros_like
        found: Gradients = []
        dots: list[tuple[int, int, Factors, Own, Tensor, Tensor | None]] = []
        for run, own in zip(layout.runs, self._owns, strict=True):
            for layer, (h, f) in zip(layers[run.layer : run.layer + run.layers], own.parts, strict=True):
                g, y, gain = g_NO[h], back.y_NO[h], own.gains.get(h)
                da = None if x is None else make(f.a)
                db = None if x is None or g is None else make(f.b)
                layer.da, layer.db = (None if d is None else d.data_ptr() for d in (da, db))
                if x is not None and g is not None and y is not None and gain is not None:
                    u_nR = u[run.u : run.u + run.rows * run.columns].view(run.rows, run.columns)
                    seen = None if f.dropout is None else u_nR[:, layer.at : layer.at + layer.rank]
                    dots.append((len(found) + 2, h, f, own, make(gain), seen))
                    layer.dots = dots[-1][4].data_ptr()
                found += [da, db, None]
        if cells:
            self._call("veneer_low_rank_backward", layout, layers, Call(), x, back.dx_NK, memory, u, g_NO, back.y_NO)
        for place, h, f, own, dots_O, seen in dots:
            g, y = g_NO[h], back.y_NO[h]
            assert x is not None and g is not None and y is not None
            g_nO, y_nO, x_nK = (take(t, own.rows) for t in (g, y, x))
            reduction = Reduction(back.layers[h], f, own.gains[h], g_nO, y_nO, x_nK, seen)
            found[place] = by_magnitude(reduction, dots_O)
        return found

    def _layout(self, cells: int) -> Layout:
        found = self._layouts.get(cells)
        if found is None:
            if len(self._layouts) >= _SIZES:
                self._layouts.clear()
            found = self._layouts[cells] = Layout(self._layers, self._owns, cells, whole=self._wholes.get(cells, False))
        return found

    def _places(self, layout: Layout, device: torch.device) -> list[Tensor | None]:
        """What dropout hides, layer by layer; nothing where nothing is dropped."""
        if not self._drops:
            return []
        pairs = zip(layout.runs, self._owns, strict=True)
        return [f.places(run.rows * self._columns, device) for run, own in pairs for _, f in own.parts]

    def _hidden(self, layout: Layout, gone: Sequence[Tensor | None]) -> Any:
        """The layers, each with the places that dropout hides from it."""
        layers = layout.own_layers() if gone else layout.layers
        for layer, places in zip(layers if gone else (), gone, strict=True):
            if places is not None:
                layer.gone, layer.lost = places.data_ptr(), len(places)
        return layers

    def _call(
        self,
        name: str,
        layout: Layout,
        layers: Any,
        call: Call,
        x: Tensor | None,
        dx: Tensor | None,
        memory: Tensor,
        u: Tensor,
        y_NO: Sequence[Tensor | None],
        out_NO: Sequence[Tensor | None] = (),
    ) -> None:
        call.x, call.dx, call.memory, call.u = _at(x), _at(dx), _at(memory), _at(u)
        call.y, call.out = ((ctypes.c_void_p * len(ts))(*map(_at, ts)) for ts in (y_NO, out_NO))
        columns, count = ctypes.c_long(self._columns), ctypes.c_long(len(layout.runs))
        threads = torch.get_num_threads()
        getattr(self._made, name)(KINDS[memory.dtype], columns, layout.runs, count, layers, ctypes.byref(call), threads)


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
