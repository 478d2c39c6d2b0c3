"""One decoding step of a whole decoder in C++ (``cpp/decode.cpp``), for a few rows that are each the next token of a sequence of their own.

For each layer, with row n's adapters p of weight w_p,

    y_n = C_n * (x_n W^T) + b + sum_p w_p (x_n A_p^T) (s S B)_p^T,      C_n = 1 + sum_p w_p (S_p - 1)
    x = x + O(attention(rotate(Q(norm(x))), cache));   x = x + DOWN(silu(GATE(norm(x))) * UP(norm(x)))

which is a decoder in Llama's form: RMSNorm, queries and keys rotated by halves and optionally normed by head, grouped heads that see all
tokens or a window of them, a gated SiLU layer.
Its plain form is the model itself, run by a `FlatRunner` on a paged cache. Weights are fp32, bf16 or quantized, which are dequantized a few
rows at a time; sums are in fp32, rounded where models round. A row's result does not depend on the other rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels.cpp_library import KINDS, function, library
from veneer.kernels.quantized.native import DENSE, WeightView, view_of
from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = ["LINEARS", "DecoderKernel", "DecoderWeights", "LayerWeights", "LowRankLayer", "LowRankTable"]

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_LANES = 16
_LONG, _POINTER, _FLOAT, _INT = ctypes.c_long, ctypes.c_void_p, ctypes.c_float, ctypes.c_int


@dataclass(frozen=True)
class LayerWeights:
    """One layer: weights [out, in], dense or quantized, and biases by the names in `LINEARS`, and norms [D]. Head norms may be None."""

    weights: Mapping[str, Tensor | QuantizedWeight]
    biases: Mapping[str, Tensor | None]
    norm: Tensor
    norm_after: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """A decoder. ``size`` is the size of a head, ``scale`` multiplies scores, ``head`` is [V, D]."""

    layers: Sequence[LayerWeights]
    embedding: Tensor
    norm: Tensor
    head: Tensor
    heads: int
    groups: int
    size: int
    eps: float
    scale: float

    def tensors(self) -> list[Tensor]:
        """Its dense tensors."""
        found = [self.embedding, self.norm, self.head]
        for layer in self.layers:
            found += [layer.norm, layer.norm_after, *(w for w in layer.weights.values() if isinstance(w, Tensor))]
            found += [t for t in (*layer.biases.values(), layer.q_norm, layer.k_norm) if t is not None]
        return found

    def _quantized(self) -> list[QuantizedWeight]:
        return [w for layer in self.layers for w in layer.weights.values() if not isinstance(w, Tensor)]

    def fits(self) -> bool:
        """True if the kernel takes a decoder of these shapes, dtypes and places in memory."""
        dtype = self.embedding.dtype
        if dtype not in KINDS or self.heads % self.groups or self.heads // self.groups > 64 or self.size % 32:
            return False
        plain = all(
            t.dtype == dtype and t.is_cpu and t.is_contiguous() and type(t.data) is Tensor for t in self.tensors()
        )
        sizes = [size for t in self.tensors() for size in t.shape]
        sizes += [size for weight in self._quantized() for size in weight.shape]
        known = all(weight.native() is not None for weight in self._quantized())
        return plain and known and all(size % _LANES == 0 for size in sizes) and self._shaped()

    def _shaped(self) -> bool:
        width, inner = self.norm.shape[0], self.layers[0].weights["gate"].shape[0]
        q, k = self.heads * self.size, self.groups * self.size
        shapes = {"q": (q, width), "k": (k, width), "v": (k, width), "o": (width, q), "down": (width, inner)}
        shapes |= {"gate": (inner, width), "up": (inner, width)}
        pairs_fit = self.embedding.dtype != torch.bfloat16 or all(size % 32 == 0 for size in (width, inner, q))
        return pairs_fit and all(
            tuple(layer.weights[name].shape) == shape for layer in self.layers for name, shape in shapes.items()
        )


@dataclass(frozen=True)
class LowRankLayer:
    """An adapter at one linear layer: A [r, in], s S B [out, r] and S - 1 [out] or None, in fp32."""

    a: Tensor
    b: Tensor
    gain: Tensor | None


class _Factor(ctypes.Structure):
    _fields_ = [("rank", _LONG), ("a", _POINTER), ("b", _POINTER), ("stride", _LONG), ("gained", _LONG)]


class LowRankTable:
    """An adapter's factors at every layer of a decoder, laid out for the kernel.

    Args:
        layers: the number of layers.
        parts: the factors by (layer, linear).
        dtype: the decoder's.
    """

    def __init__(self, layers: int, parts: Mapping[tuple[int, str], LowRankLayer], dtype: torch.dtype) -> None:
        self.rows = (_Factor * (layers * len(LINEARS)))()
        self.most = max((len(part.a) for part in parts.values()), default=0)
        self._alive: list[Tensor] = []
        for (layer, linear), part in parts.items():
            row = self.rows[layer * len(LINEARS) + LINEARS.index(linear)]
            out, rank = part.b.shape
            row.rank = rank
            row.a = self._keep(part.a.to(dtype))
            b = part.b.to(dtype).reshape(out // _LANES, _LANES, rank).transpose(1, 2).reshape(out // _LANES, -1)
            blocks = b.contiguous().view(torch.uint8)
            if part.gain is not None:  # beside its factors, so that both are read as one stretch
                blocks = torch.cat(
                    [part.gain.float().reshape(-1, _LANES).contiguous().view(torch.uint8), blocks], dim=1
                )
            row.b, row.stride, row.gained = self._keep(blocks), blocks.shape[1], part.gain is not None

    def _keep(self, tensor: Tensor) -> int:
        self._alive.append(tensor.contiguous())
        return self._alive[-1].data_ptr()

    @property
    def address(self) -> int:
        """Address of the first entry of the table."""
        return ctypes.addressof(self.rows)


class _Block(ctypes.Structure):
    _fields_ = [
        ("weight", WeightView * len(LINEARS)),
        ("bias", _POINTER * len(LINEARS)),
        *((name, _POINTER) for name in ("norm", "norm_after", "q_norm", "k_norm", "keys", "values")),
        ("before", _LONG),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *((name, _LONG) for name in ("layers", "width", "heads", "groups", "size", "inner", "vocabulary")),
        *((name, _POINTER) for name in ("embedding", "norm", "head", "blocks")),
        ("eps", _FLOAT),
        ("scale", _FLOAT),
        ("block", _LONG),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("rows", _LONG),
        *((name, _POINTER) for name in ("ids", "lengths", "tables")),
        ("stride", _LONG),
        *((name, _POINTER) for name in ("cos", "sin", "first", "factors", "weights")),
        ("most", _LONG),
        ("logits", _POINTER),
    ]


class DecoderKernel:
    """Decoding steps of one decoder over one paged cache.

    Args:
        weights: a decoder that `DecoderWeights.fits`.
        cache: (keys [S, G, D], values [S, G, D]) of each layer.
        block: tokens of a cache block.
        reaches: tokens back that each layer attends to, None for all.

    Raises:
        RuntimeError: the kernels are not in use.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        cache: Sequence[tuple[Tensor, Tensor]],
        block: int,
        reaches: Sequence[int | None],
    ) -> None:
        made = library()
        if made is None:
            raise RuntimeError("the C++ kernels are not in use")
        self._run = function(made, "veneer_decode", (_INT, _POINTER, _POINTER, _INT))
        self._weights, self._cache = weights, cache  # kept, since addresses point into them
        self._kind = KINDS[weights.embedding.dtype]
        self._blocks = (_Block * len(weights.layers))()
        for row, layer, (keys, values), before in zip(self._blocks, weights.layers, cache, reaches, strict=True):
            for number, name in enumerate(LINEARS):
                row.weight[number] = _view(layer.weights[name])
                row.bias[number] = _at(layer.biases[name])
            row.norm, row.norm_after = layer.norm.data_ptr(), layer.norm_after.data_ptr()
            row.q_norm, row.k_norm = _at(layer.q_norm), _at(layer.k_norm)
            row.keys, row.values = keys.data_ptr(), values.data_ptr()
            row.before = -1 if before is None else before
        self._decoder = _Decoder(
            len(weights.layers),
            weights.norm.shape[0],
            weights.heads,
            weights.groups,
            weights.size,
            weights.layers[0].weights["gate"].shape[0],
            weights.head.shape[0],
            weights.embedding.data_ptr(),
            weights.norm.data_ptr(),
            weights.head.data_ptr(),
            ctypes.addressof(self._blocks),
            weights.eps,
            weights.scale,
            block,
        )

    def step(
        self,
        ids: Sequence[int],
        lengths: Sequence[int],
        tables: Sequence[Sequence[int]],
        cos_ND: Tensor,
        sin_ND: Tensor,
        mixes: Sequence[Sequence[tuple[LowRankTable, float]]],
    ) -> Tensor:
        """Logits [N, V] in fp32; the new keys and values are written into the cache.

        Args:
            ids: the token of each row.
            lengths: tokens of each row's context, this one included.
            tables: the cache blocks of each row.
            cos_ND, sin_ND: the rotation of each row's position, in fp32.
            mixes: the adapters of each row with their weights.
        """
        rows, stride = len(ids), max(map(len, tables))
        first, parts = [0], [part for mix in mixes for part in mix]
        for mix in mixes:
            first.append(first[-1] + len(mix))
        longs = torch.tensor([*ids, *lengths, *first, *(b for t in tables for b in (*t, *([0] * (stride - len(t)))))])
        addresses = (_POINTER * max(1, len(parts)))(*(table.address for table, _ in parts))
        weights = (_FLOAT * max(1, len(parts)))(*(weight for _, weight in parts))
        logits = torch.empty(rows, self._decoder.vocabulary)
        at = longs.data_ptr()
        step = _Step(
            rows,
            at,
            at + 8 * rows,
            at + 8 * (3 * rows + 1),
            stride,
            cos_ND.data_ptr(),
            sin_ND.data_ptr(),
            at + 8 * 2 * rows,
            ctypes.addressof(addresses),
            ctypes.addressof(weights),
            max((table.most for table, _ in parts), default=0),
            logits.data_ptr(),
        )
        self._run(self._kind, ctypes.addressof(self._decoder), ctypes.addressof(step), torch.get_num_threads())
        return logits


def _view(weight: Tensor | QuantizedWeight) -> WeightView:
    found = view_of(DENSE, weight.shape[1], weight) if isinstance(weight, Tensor) else weight.native()
    assert found is not None  # `DecoderWeights.fits`
    return found


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
