"""All adapters' part in a fast adapted linear call, in C++ (``cpp/low_rank.cpp``): each adapter on consecutive tokens.

    forward     u = w x A^T,          y_h = S (W_h x) + b_h + u_h (s S B)_h^T
    backward    G = w [g_1 (s S B)_1 | g_2 (s S B)_2 | ...],      dx += G A,      dA = G^T x,      dB_h = s S u_h^T g_h

and sum_t g_h (y_h - b_h), from which m's gradient is made. The formulas are those of `SingleBranch`, which is the reference. Each of
these products alone moves far more than it multiplies, and is slow in matrix libraries for that; here a block of tokens is read once
for all of them, one call does for all adapters and layers, and gradients come out in the masters' fp32 with nothing rounded between.
Rounded to the compute dtype are A, s S B, u and G.

In bf16, where the processor multiplies pairs of it and every token has an adapter, the products with the frozen weights are taken here
too (``cpp/products.h``), one for each layer and one for the gradient of the input, with S and the low-rank products inside.

Dropout hides some numbers of x from a layer's factors: products with A then take a copy of x, a block of tokens at a time, with zeros in
their place. The factor 1 / (1 - p) is part of w.

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
    AdapterPart,
    Backward,
    Branch,
    Factors,
    Gradients,
    Layer,
    Reduction,
    magnitude_gradient,
    take,
)
from veneer.kernels.lora.single import SingleBranch

__all__ = ["AdapterSpan", "NativeBranch", "agrees", "fits"]

_STEP = 32
"""Widths are multiples of it."""
_HIGHEST = {torch.float32: 16, torch.bfloat16: 64}
"""Ranks above which matrix libraries are as quick (docs/log/kernels.md)."""

_SIZES = 8
"""Layouts for calls of so many sizes are kept."""
_MANY = 16
"""Tokens an adapter from which on products of weights are quicker here for each by itself; packing a panel of a weight costs that much."""
_MAX_INDEX = 2**31 - 1
"""Largest index of a dropped number."""
_UNIT = 8
"""Ranks are padded to a multiple of it."""
_LONG, _POINTER, _INT, _FLOAT = ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_float


def fits(layers: Sequence[Layer], factors: Sequence[Factors | None] = (), numbers: int = 0) -> bool:
    """True if an adapter's part at these layers can be computed in C++; without factors, whether any could. The input has ``numbers``."""
    weight = layers[0][0]
    if library() is None or weight.dtype not in KINDS or weight.device.type != "cpu" or weight.shape[1] % _STEP:
        return False
    # torch refuses a bias of another dtype; an address does not show it.
    if any(bias is not None and not (bias.dtype == weight.dtype and bias.is_contiguous()) for _, bias in layers):
        return False
    there = [f for f in factors if f is not None]
    if numbers > _MAX_INDEX and any(f.dropout is not None for f in there):
        return False
    return all(_knows(f, _HIGHEST[weight.dtype]) for f in there) and len({f.kept for f in there}) <= 1


def _knows(f: Factors, highest: int) -> bool:
    wide = f.a.dtype == f.b.dtype == torch.float32 and (f.norm is None or f.norm.dtype == torch.float32)
    laid = f.a.is_contiguous() and f.b.is_contiguous() and len(f.b) % _STEP == 0
    return wide and laid and len(f.a) <= highest


def agrees() -> bool:
    """True if the kernels, as built here, agree with `SingleBranch` on random numbers."""
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
        for branch in (NativeBranch(layers, [AdapterSpan(None, 0.7, factors)]), SingleBranch(None, 0.7, factors)):
            branch.takes_base_product(len(x))  # may include the base products, which overwrite these
            y = [x @ weight.T for weight, _ in layers]
            dx = sum(
                (grad @ w for grad, (w, _) in zip(g, layers, strict=True) if grad is not None), torch.zeros_like(x)
            )
            kept = branch.run_(x, y)
            grads = branch.gradients_(Backward(layers, x, [None, None], g, dx), kept)
            found.append([t.double() for t in (*y, dx, *grads) if t is not None])
        if not all((a - b).norm() <= bound * b.norm() for a, b in zip(*found, strict=True)):
            return False
    return True


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
    """One adapter in a call, without the call's tensors."""

    _fields_ = [
        *((name, _LONG) for name in ("rows", "first", "columns", "layers", "layer", "memory", "u")),
        ("weights", _POINTER),
        ("weight", _FLOAT),
    ]


class NativeCall(ctypes.Structure):
    """The tensors of a call, y and out by layer."""

    _fields_ = [
        *((name, _POINTER) for name in ("x", "dx", "memory", "u")),
        *((name, ctypes.POINTER(_POINTER)) for name in ("y", "out")),
        *((name, _INT) for name in ("packed", "joint")),
    ]


class AdapterSpan(AdapterPart):
    """One adapter in the call, on consecutive tokens."""

    def range(self, tokens: int) -> tuple[int, int]:
        """(first token, number of tokens) in a call with so many."""
        assert not isinstance(self.tokens, Tensor)
        first, last, _ = (self.tokens or slice(None)).indices(tokens)
        return first, max(0, last - first)


def covers(spans: Sequence[AdapterSpan], h: int, tokens: int) -> bool:
    """True if each of `tokens` tokens has an adapter at layer h."""
    return tokens == sum(span.range(tokens)[1] for span in spans if span.factors[h] is not None)


class NativeLayout:
    """The adapters (runs) and their layers, for all calls with this number of tokens. Read only, so threads may share it.

    The structures are those of the C++ sources, field by field.
    """

    def __init__(self, layers: Sequence[Layer], spans: Sequence[AdapterSpan], tokens: int, *, with_base: bool) -> None:
        self.runs = (RunRow * len(spans))()
        self.layers = (LayerRow * sum(len(span.parts) for span in spans))()
        self.alive: list[Tensor] = []
        """Tensors that addresses point to."""
        self.covered = [covers(spans, h, tokens) for h in range(len(layers))]
        """True if each token has an adapter, by layer."""
        self.memory = self.u = layer = 0
        for run, span in zip(self.runs, spans, strict=True):
            run.first, run.rows = span.range(tokens)
            run.layer, run.layers, run.memory, run.u = layer, len(span.parts), self.memory, self.u
            self._weigh(run, span)
            for h, f in span.parts:
                self._lay(self.layers[layer], run, h, f, layers[h], span.scales.get(h), with_base=with_base)
                layer += 1
            self.u += run.columns * run.rows

    def _weigh(self, run: RunRow, span: AdapterSpan) -> None:
        weight = span.weight / next((f.kept for _, f in span.parts), 1.0)
        if isinstance(weight, Tensor):
            self.alive.append(weight.to(torch.float32).contiguous())
            run.weights = self.alive[-1].data_ptr()
        else:
            run.weight = weight

    def _lay(
        self, row: LayerRow, run: RunRow, h: int, f: Factors, layer: Layer, s: Tensor | None, *, with_base: bool
    ) -> None:
        weight, bias = layer
        rank, width = len(f.a), len(f.b)
        row.host, row.lost = h, -1
        row.w, row.turned = weight.data_ptr() if with_base else None, not weight.is_contiguous()
        row.bias = None if bias is None else bias.data_ptr()
        row.width, row.rank, row.at, row.scale = width, rank, run.columns, f.scale
        row.a, row.b, row.gain = f.a.data_ptr(), f.b.data_ptr(), None if s is None else s.data_ptr()
        padded = -(-rank // _UNIT) * _UNIT
        run.columns += padded
        self.memory += 2 * padded * (weight.shape[1] + width)

    def copy_layers(self) -> Any:
        """A copy of the layers, for the addresses of one call."""
        return type(self.layers).from_buffer_copy(self.layers)


class NativeBranch(Branch):
    """Adapters that share no token, as one branch.

    lasting: the factors do not change while this branch is used, so they are packed once.
    """

    applies_magnitude = True

    def __init__(self, layers: Sequence[Layer], spans: Sequence[AdapterSpan], *, lasting: bool = False) -> None:
        self._spans = spans
        self._layers = layers
        self._columns = layers[0][0].shape[1]
        self._layouts: dict[int, NativeLayout] = {}
        self._with_base: dict[int, bool] = {}
        """Answers of `takes_base_product`; a call with other branches does not ask, and takes no base products here."""
        self._lasting = lasting
        self._packed: Tensor | None = None
        self.scaled = {h for span in self._spans for h in span.scales}
        self._drops = any(span.drops for span in self._spans)
        self._made = library()
        """Kept, so that backward uses the library of its forward."""
        self.masters: list[Tensor | None] = [m for span in self._spans for _, f in span.parts for m in f.masters]

    def takes_base_product(self, tokens: int) -> bool:
        if tokens in self._with_base:
            return self._with_base[tokens]
        weights = [weight for weight, _ in self._layers]
        if weights[0].is_meta:  # made for one call only
            return False
        most = longest_product() if weights[0].dtype == torch.bfloat16 else 0
        fits = max(self._columns, sum(map(len, weights))) <= most
        fits = fits and all(w.is_contiguous() or (w.T.is_contiguous() and not self.scaled) for w in weights)
        fits = fits and (self._lasting or not self._sparse(tokens))
        if len(self._with_base) >= _SIZES:
            self._with_base.clear()
        self._with_base[tokens] = fits and all(covers(self._spans, h, tokens) for h in range(len(weights)))
        return self._with_base[tokens]

    def _sparse(self, tokens: int) -> bool:
        """True if adapters have too few tokens for separate products with the weights."""
        return tokens < _MANY * len(self._spans)

    def covers_all_tokens(self, h: int, tokens: int) -> bool:
        return self._layout(tokens).covered[h]

    def full_magnitude_scale(self, h: int) -> Tensor | None:
        first = self._spans[0]
        return first.scales.get(h) if len(self._spans) == 1 and first.tokens is None else None

    def apply_magnitude_(self, h: int, t_NO: Tensor, bias_O: Tensor | None) -> None:
        for span in self._spans:
            span.apply_magnitude_(h, t_NO, bias_O)

    def run_(self, x_NK: Tensor, y_NO: Sequence[Tensor]) -> list[Tensor | None]:
        """Multiply the outputs by S, and add the low-rank products. Keeps the packed factors, u, and dropped indices."""
        x = x_NK.contiguous()
        layout = self._layout(len(x))
        packed = self._packed
        memory = x.new_empty(layout.memory) if packed is None else packed
        u = x.new_empty(layout.u)
        gone = self._dropped(layout, x.device)
        layers = self._hidden(layout, gone)
        joint = self._with_base.get(len(x), False) and self._sparse(len(x))
        call = NativeCall(packed=packed is not None, joint=joint)
        self._call("veneer_low_rank_forward", layout, layers, call, x, None, memory, u, y_NO)
        if self._lasting:
            self._packed = memory
        return [memory, u, *gone]

    def gradients_(self, back: Backward, kept: Sequence[Tensor | None]) -> Gradients:
        memory, u, *gone = kept
        assert memory is not None and u is not None
        g_NO = [None if g is None else g.contiguous() for g in back.g_NO]
        tokens = next((len(g) for g in g_NO if g is not None), 0)
        x = None if back.x_NK is None else back.x_NK.contiguous()
        layout = self._layout(tokens)
        layers = self._hidden(layout, gone) if self._drops else layout.copy_layers()
        make = torch.empty_like if tokens else torch.zeros_like
        found: Gradients = []
        dots: list[tuple[int, int, Factors, AdapterSpan, Tensor, Tensor | None]] = []
        for run, span in zip(layout.runs, self._spans, strict=True):
            for layer, (h, f) in zip(layers[run.layer : run.layer + run.layers], span.parts, strict=True):
                g, y, s = g_NO[h], back.y_NO[h], span.scales.get(h)
                da = None if x is None else make(f.a)
                db = None if x is None or g is None else make(f.b)
                layer.da, layer.db = (None if d is None else d.data_ptr() for d in (da, db))
                if x is not None and g is not None and y is not None and s is not None:
                    u_nR = u[run.u : run.u + run.rows * run.columns].view(run.rows, run.columns)
                    seen = None if f.dropout is None else u_nR[:, layer.at : layer.at + layer.rank]
                    dots.append((len(found) + 2, h, f, span, make(s), seen))
                    layer.dots = dots[-1][4].data_ptr()
                found += [da, db, None]
        if tokens:
            self._call(
                "veneer_low_rank_backward", layout, layers, NativeCall(), x, back.dx_NK, memory, u, g_NO, back.y_NO
            )
        for position, h, f, span, dots_O, seen in dots:
            g, y = g_NO[h], back.y_NO[h]
            assert x is not None and g is not None and y is not None
            g_nO, y_nO, x_nK = (take(t, span.tokens) for t in (g, y, x))
            reduction = Reduction(back.layers[h], f, span.scales[h], g_nO, y_nO, x_nK, seen)
            found[position] = magnitude_gradient(reduction, dots_O)
        return found

    def _layout(self, tokens: int) -> NativeLayout:
        found = self._layouts.get(tokens)
        if found is None:
            if len(self._layouts) >= _SIZES:
                self._layouts.clear()
            found = self._layouts[tokens] = NativeLayout(
                self._layers, self._spans, tokens, with_base=self._with_base.get(tokens, False)
            )
        return found

    def _dropped(self, layout: NativeLayout, device: torch.device) -> list[Tensor | None]:
        """Dropped indices, layer by layer; empty without dropout."""
        if not self._drops:
            return []
        pairs = zip(layout.runs, self._spans, strict=True)
        return [f.dropped(run.rows * self._columns, device) for run, span in pairs for _, f in span.parts]

    def _hidden(self, layout: NativeLayout, gone: Sequence[Tensor | None]) -> Any:
        """The layers, each with the indices that dropout hides from it."""
        layers = layout.copy_layers() if gone else layout.layers
        for layer, indices in zip(layers if gone else (), gone, strict=True):
            if indices is not None:
                layer.gone, layer.lost = indices.data_ptr(), len(indices)
        return layers

    def _call(
        self,
        name: str,
        layout: NativeLayout,
        layers: Any,
        call: NativeCall,
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
