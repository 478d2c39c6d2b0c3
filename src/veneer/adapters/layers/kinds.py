"""Layer kinds: how adapters act on one kind of base layer.

A method describes a low-rank change in one orientation, out x in; a layer kind translates it into its layer's storage and arithmetic. So
methods x layer kinds is a sum: neither asks which the other is.

    kind           layer                     weight stored      lora_A            lora_B           W seen as [out, in]
    linear         nn.Linear                 [out, in]          [r, in]           [out, r]         weight
    conv1d         transformers' Conv1D      [in, out]          [r, in]           [out, r]         weight^T
    embedding      nn.Embedding              [vocab, dim]       [r, vocab]        [dim, r]         weight^T
    conv2d         nn.Conv2d                 [out, in, kh, kw]  [r, in, kh, kw]   [out, r, 1, 1]   weight, flattened
    vector_layer   norms and the like        [d]                (overrides only)

A layer kind reads the module at a site; it never copies or edits the base's tensors. Shapes: N tokens (or rows), K in, O out, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.lora.dora_norm import squared_row_norms
from veneer.kernels.quantized.weight import QuantizedWeight


@dataclass(frozen=True)
class Geometry:
    """Shapes at a site: ``out`` and ``in_`` features and the shapes in which PEFT stores the two factors of rank r."""

    kind: str
    out: int
    in_: int
    kernel: tuple[int, int] = (1, 1)

    def shape_a(self, r: int) -> tuple[int, ...]:
        """Shape of the down projection of rank ``r``."""
        return (r, self.in_, *self.kernel) if self.kind == "conv2d" else (r, self.in_)

    def shape_b(self, r: int) -> tuple[int, ...]:
        """Shape of the up projection of rank ``r``."""
        return (self.out, r, 1, 1) if self.kind == "conv2d" else (self.out, r)

    @property
    def fan_in(self) -> int:
        """Number of inputs that one output sums over: the k of kaiming's bound."""
        return self.in_ * math.prod(self.kernel)


class LayerKind:
    """Operations of adapters on one kind of layer. The base class is nn.Linear with its weight [out, in]. Stateless."""

    kind = "linear"
    is_layer = True
    """False for a weight that the module's forward uses among other steps: the module's output is not that of this layer."""
    output_dims = 1
    """Number of trailing dimensions of an output that belong to one token."""

    def geometry(self, module: Any) -> Geometry:
        """The shapes at this module."""
        return Geometry(self.kind, module.out_features, module.in_features)

    def weight_2d(self, module: Any) -> Tensor:
        """The base weight as a view [out, in] (conv2d: [out, in*kh*kw]); no copy."""
        return self.dense(module)

    def dense(self, module: Any) -> Tensor:
        """The base weight in its stored layout, [out, in] for a linear layer; no copy unless it is quantized."""
        weight: Tensor = module.weight
        return weight

    def quantized(self, module: Any) -> QuantizedWeight | None:
        """The quantized weight, or None for a dense one."""
        return None

    def squared_norms(self, module: Any) -> Tensor:
        """||W_o||^2 of the base weight, [out]."""
        return squared_row_norms(self.weight_2d(module).detach())

    def dtype(self, module: Any) -> torch.dtype:
        """The data type that the base weight is computed with."""
        dtype: torch.dtype = module.weight.dtype
        return dtype

    def bias(self, module: Any) -> Tensor | None:
        """The base bias [out], or None."""
        bias: Tensor | None = module.bias
        return bias

    def batch_shape(self, module: Any, x: Tensor) -> tuple[int, ...]:
        """The leading sizes of an input, which a route's rows or tokens are matched with."""
        return tuple(x.shape[:-1])

    def by_token(self, module: Any, x: Tensor) -> Tensor:
        """An input with its tokens in the first dimensions."""
        return x

    def flatten(self, x: Tensor) -> Tensor:
        """An input as [N, ...], one token a row."""
        return x.reshape(-1, x.shape[-1])

    def low_rank(self, module: Any, x_N: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B(A x) for the tokens ``x_N``, without the scale: [N, out, ...]."""
        return F.linear(F.linear(x_N, a), b)

    def per_output(self, v_O: Tensor) -> Tensor:
        """A vector over outputs, shaped to broadcast over [N, out, ...]."""
        return v_O

    def stored(self, module: Any, delta_OK: Tensor) -> Tensor:
        """A dense change [out, in] in the layout of the stored weight."""
        return delta_OK


class Conv1DKind(LayerKind):
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored [in, out]."""

    kind = "conv1d"

    def geometry(self, module: Any) -> Geometry:
        in_, out = module.weight.shape
        return Geometry(self.kind, out, in_)

    def weight_2d(self, module: Any) -> Tensor:
        return self.dense(module).T

    def stored(self, module: Any, delta_OK: Tensor) -> Tensor:
        return delta_OK.T


class EmbeddingKind(LayerKind):
    """nn.Embedding: weight [vocab, dim]; the change is a lookup in A followed by B, no product over the vocabulary."""

    kind = "embedding"

    def geometry(self, module: Any) -> Geometry:
        return Geometry(self.kind, module.embedding_dim, module.num_embeddings)

    def weight_2d(self, module: Any) -> Tensor:
        return self.dense(module).T

    def bias(self, module: Any) -> Tensor | None:
        return None

    def batch_shape(self, module: Any, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    def flatten(self, x: Tensor) -> Tensor:
        return x.reshape(-1)

    def low_rank(self, module: Any, x_N: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # As in the base's own lookup, the padding token's row of A gets no gradient.
        return F.linear(F.embedding(x_N, a.T, module.padding_idx), b)

    def stored(self, module: Any, delta_OK: Tensor) -> Tensor:
        return delta_OK.T


class ScaledEmbeddingKind(EmbeddingKind):
    """An embedding that multiplies its lookups by a constant (Gemma): the change takes the same constant."""

    def low_rank(self, module: Any, x_N: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low_NO = super().low_rank(module, x_N, a, b)
        return low_NO * torch.as_tensor(module.embed_scale).to(low_NO)


class Conv2dKind(LayerKind):
    """nn.Conv2d: A is a convolution of the same geometry into r channels, B a 1x1 convolution out of them."""

    kind = "conv2d"
    output_dims = 3

    def geometry(self, module: Any) -> Geometry:
        out, in_, kh, kw = module.weight.shape
        return Geometry(self.kind, out, in_, (kh, kw))

    def weight_2d(self, module: Any) -> Tensor:
        return self.dense(module).flatten(1)

    def batch_shape(self, module: Any, x: Tensor) -> tuple[int, ...]:
        # An unbatched image [C, H, W] is one token without a leading size.
        return (x.shape[0],) if x.dim() == 4 else (1,)

    def flatten(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.unsqueeze(0)

    def low_rank(self, module: Any, x_N: Tensor, a: Tensor, b: Tensor) -> Tensor:
        padding = module.padding
        if module.padding_mode != "zeros":
            x_N = F.pad(x_N, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0, 0)
        return F.conv2d(F.conv2d(x_N, a, None, module.stride, padding, module.dilation), b)

    def per_output(self, v_O: Tensor) -> Tensor:
        return v_O.reshape(-1, 1, 1)

    def stored(self, module: Any, delta_OK: Tensor) -> Tensor:
        return delta_OK.reshape(module.weight.shape)


class VectorKind(LayerKind):
    """A layer whose parameters are vectors over its last dimension: overrides act there, low-rank changes do not."""

    kind = "vector_layer"

    def geometry(self, module: Any) -> Geometry:
        size = next(module.parameters(recurse=False)).shape[0]
        return Geometry(self.kind, size, size)
