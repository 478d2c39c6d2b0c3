"""Hosts: how one kind of base layer lets adapters act there.

A method speaks of a low-rank change in one orientation, out x in; a host translates that into its layer's own storage and
arithmetic. So methods x layer kinds is a sum: a method never asks what the layer is, a host never asks which method.

    kind        layer                     weight stored      lora_A            lora_B           W seen as [out, in]
    linear      nn.Linear                 [out, in]          [r, in]           [out, r]         weight
    conv1d      transformers' Conv1D      [in, out]          [r, in]           [out, r]         weight^T
    embedding   nn.Embedding              [vocab, dim]       [r, vocab]        [dim, r]         weight^T
    conv2d      nn.Conv2d                 [out, in, kh, kw]  [r, in, kh, kw]   [out, r, 1, 1]   weight, flattened
    tied_head   the output layer that     [vocab, dim]       (the embedding's factors, transposed)
                shares an embedding's weight

Boundary: a host reads the module that stands at a site; it never copies or edits the base's tensors. Shapes in names: N cells
(rows or tokens), K in, O out, R rank.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        """How many inputs one output sums over: the k of kaiming's bound."""
        return self.in_ * math.prod(self.kernel)


class LayerKind(Protocol):
    """What the rest of the room asks of a layer kind. Implementations hold no state."""

    kind: str

    def geometry(self, module: nn.Module) -> Geometry:
        """The shapes at this module."""
        ...

    def weight_2d(self, module: Any) -> Tensor:
        """The base weight as a view [out, in] (conv2d: [out, in*kh*kw]); no copy."""
        ...

    def bias(self, module: Any) -> Tensor | None:
        """The base bias [out], or None."""
        ...

    def lead(self, module: Any, x: Tensor) -> tuple[int, ...]:
        """The leading sizes of an input: what a route's rows or tokens are matched with."""
        ...

    def flatten(self, x: Tensor) -> Tensor:
        """An input as [N, ...], one cell a row."""
        ...

    def low(self, module: Any, x_N: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B(A x) for the cells ``x_N``, without the scale: [N, out, ...]."""
        ...

    def per_output(self, v_O: Tensor) -> Tensor:
        """A vector over outputs, shaped to broadcast over [N, out, ...]."""
        ...

    def delta(self, module: Any, delta_OK: Tensor) -> Tensor:
        """A dense change [out, in] in the layout of the stored weight."""
        ...


class LinearKind:
    """nn.Linear: weight [out, in]."""

    kind = "linear"

    def geometry(self, module: Any) -> Geometry:
        return Geometry(self.kind, module.out_features, module.in_features)

    def weight_2d(self, module: Any) -> Tensor:
        weight: Tensor = module.weight
        return weight

    def bias(self, module: Any) -> Tensor | None:
        bias: Tensor | None = module.bias
        return bias

    def lead(self, module: Any, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[:-1])

    def flatten(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def low(self, module: Any, x_N: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x_N, a), b)

    def per_output(self, v_O: Tensor) -> Tensor:
        return v_O

    def delta(self, module: Any, delta_OK: Tensor) -> Tensor:
        return delta_OK


class Conv1DKind(LinearKind):
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored [in, out]."""

    kind = "conv1d"

    def geometry(self, module: Any) -> Geometry:
        in_, out = module.weight.shape
        return Geometry(self.kind, out, in_)

    def weight_2d(self, module: Any) -> Tensor:
        weight: Tensor = module.weight
        return weight.T

    def delta(self, module: Any, delta_OK: Tensor) -> Tensor:
        return delta_OK.T


class EmbeddingKind:
    """nn.Embedding: weight [vocab, dim]; the change is a lookup in A followed by B, no product over the vocabulary."""

    kind = "embedding"

    def geometry(self, module: Any) -> Geometry:
        return Geometry(self.kind, module.embedding_dim, module.num_embeddings)

    def weight_2d(self, module: Any) -> Tensor:
        weight: Tensor = module.weight
        return weight.T

    def bias(self, module: Any) -> Tensor | None:
        return None

    def lead(self, module: Any, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    def flatten(self, x: Tensor) -> Tensor:
        return x.reshape(-1)

    def low(self, module: Any, x_N: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # As in the base's own lookup, the padding token's row of A gets no gradient.
        return F.linear(F.embedding(x_N, a.T, module.padding_idx), b)

    def per_output(self, v_O: Tensor) -> Tensor:
        return v_O

    def delta(self, module: Any, delta_OK: Tensor) -> Tensor:
        return delta_OK.T


class ScaledEmbeddingKind(EmbeddingKind):
    """An embedding that multiplies what it looks up by a constant, as Gemma's do: the change is looked up from the same table, so it
    takes the same constant."""

    def low(self, module: Any, x_N: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low_NO = super().low(module, x_N, a, b)
        return low_NO * torch.as_tensor(module.embed_scale).to(low_NO)


class Conv2dKind:
    """nn.Conv2d: A is a convolution of the same geometry into r channels, B a 1x1 convolution out of them."""

    kind = "conv2d"

    def geometry(self, module: Any) -> Geometry:
        out, in_, kh, kw = module.weight.shape
        return Geometry(self.kind, out, in_, (kh, kw))

    def weight_2d(self, module: Any) -> Tensor:
        weight: Tensor = module.weight
        return weight.flatten(1)

    def bias(self, module: Any) -> Tensor | None:
        bias: Tensor | None = module.bias
        return bias

    def lead(self, module: Any, x: Tensor) -> tuple[int, ...]:
        # An unbatched image [C, H, W] is one cell without a leading size of its own.
        return (x.shape[0],) if x.dim() == 4 else (1,)

    def flatten(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.unsqueeze(0)

    def low(self, module: Any, x_N: Tensor, a: Tensor, b: Tensor) -> Tensor:
        padding = module.padding
        if module.padding_mode != "zeros":
            x_N = F.pad(x_N, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0, 0)
        return F.conv2d(F.conv2d(x_N, a, None, module.stride, padding, module.dilation), b)

    def per_output(self, v_O: Tensor) -> Tensor:
        return v_O.reshape(-1, 1, 1)

    def delta(self, module: Any, delta_OK: Tensor) -> Tensor:
        return delta_OK.reshape(module.weight.shape)


class TiedHeadKind(LinearKind):
    """An output layer that shares an embedding's weight and takes the embedding's factors transposed (A_head = B^T, B_head = A^T)."""

    kind = "tied_head"


class VectorKind(LinearKind):
    """A layer whose parameters are vectors over its last dimension. No low-rank change acts there, only values of an adapter's own
    (``own.py``)."""

    kind = "place"

    def geometry(self, module: Any) -> Geometry:
        size = next(module.parameters(recurse=False)).shape[0]
        return Geometry(self.kind, size, size)


def is_vector_layer(module: nn.Module) -> bool:
    """Whether a layer without a host can take values of an adapter's own: a leaf with vectors, and no statistics over a batch."""
    own = list(module.parameters(recurse=False))
    leaf = not any(True for _ in module.children())
    return leaf and bool(own) and all(p.dim() == 1 for p in own) and not hasattr(module, "running_mean")


LAYER_KINDS: dict[str, LayerKind] = {
    host.kind: host for host in (LinearKind(), Conv1DKind(), EmbeddingKind(), Conv2dKind(), TiedHeadKind())
}
_SCALED = ScaledEmbeddingKind()


PLACE = VectorKind()


def layer_kind_for(module: nn.Module) -> tuple[LayerKind | None, str]:
    """The host for a module, or None with the reason why a layer that has a weight cannot be adapted (empty: not a layer)."""
    host, reason = _by_class(module)
    if host is None:
        return None, reason
    weight = module._parameters.get("weight")
    if weight is None:
        return None, "its weight is computed from other parameters (a parametrization, weight norm or pruning)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return None, "its weight has no shape before the first forward; run the model once before attaching"
    if not weight.is_floating_point():
        return None, f"its weight is stored as {weight.dtype}, for which there is no host"
    return host, ""


def _by_class(module: nn.Module) -> tuple[LayerKind | None, str]:
    cls = type(module)
    if isinstance(module, nn.Linear):
        return _like(module, nn.Linear, "linear")
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return LAYER_KINDS["conv1d"], ""
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return None, "nn.Embedding with max_norm rewrites its own weight at every lookup"
        return _like(module, nn.Embedding, "embedding")
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return None, "grouped convolutions (groups > 1) have no host"
        return _like(module, nn.Conv2d, "conv2d")
    return None, ""


def _like(module: nn.Module, parent: type[nn.Module], kind: str) -> tuple[LayerKind | None, str]:
    """The host of a layer kind, for a subclass with a forward of its own only if that is seen to compute the same.

    Falcon writes the product of nn.Linear anew, Gemma multiplies what nn.Embedding looks up by a constant; another one may compute
    anything, and adapting it as its parent would be a guess.
    """
    cls: Any = type(module)
    if cls.forward is parent.forward:
        return LAYER_KINDS[kind], ""
    refused = None, f"{cls.__name__} overrides {parent.__name__}.forward and computes something else"
    if kind == "conv2d":
        return refused
    x = torch.tensor([[0, 2], [1, 3]]) if kind == "embedding" else torch.linspace(-1, 1, 24).view(2, 3, 4)
    try:
        twin = _twin(module)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found, expected = cls.forward(twin, x), parent.forward(twin, x)
            scale = torch.as_tensor(getattr(twin, "embed_scale", 1.0)).to(expected) if kind == "embedding" else None
    except Exception:
        return refused
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return refused
    if torch.allclose(found, expected, atol=1e-6):
        return LAYER_KINDS[kind], ""
    if scale is not None and scale.numel() == 1 and torch.allclose(found, expected * scale, atol=1e-6):
        return _SCALED, ""
    return refused


def _twin(module: nn.Module) -> Any:
    """A layer of the same class and settings with small weights of its own, to try it on without touching the module itself."""
    twin = copy.copy(module)
    vector = torch.linspace(-0.7, 0.9, 4)
    own = {"weight": torch.outer(torch.linspace(1, 2, 4), vector).sin(), "bias": vector}
    parameters = {name: None if value is None else own[name] for name, value in module._parameters.items()}
    buffers = {
        name: torch.full_like(value, 1.5, device="cpu") if value is not None and value.is_meta else value
        for name, value in module._buffers.items()
    }
    twin.__dict__.update(_parameters=parameters, _buffers=buffers)
    return twin
