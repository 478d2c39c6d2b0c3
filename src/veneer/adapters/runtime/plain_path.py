"""The plain path: the base layer's own output, and each adapter's change added to it (``kernels/lora/reference.py`` has the formula).

It computes every method, layer kind, dtype and mix. Autograd derives the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import LayerKind
from veneer.adapters.runtime.forward_pass import ForwardPass
from veneer.adapters.runtime.layer import AdaptedLayer, AdapterAtSite
from veneer.adapters.runtime.plan import Assignment
from veneer.kernels.lora.dropout import drop
from veneer.kernels.lora.reference import AdapterTerm, adapted


def plain_forward(
    layer: AdaptedLayer, current: ForwardPass, assignments: Sequence[Assignment], x: Tensor, y: Tensor
) -> Tensor:
    """Add the adapters' changes to ``y``, the base layer's output for ``x``."""
    kind, module = layer.site.layer_kind, layer.site.module
    terms = [_term(layer, current, assignment, y) for assignment in assignments]
    x_N = kind.flatten(x)
    y_N = y.reshape(x_N.shape[0], *y.shape[y.dim() - kind.output_dims :])
    bias = kind.bias(module)
    return adapted(y_N, x_N, None if bias is None else kind.per_output(bias), terms).reshape(y.shape)


def _term(layer: AdaptedLayer, current: ForwardPass, assignment: Assignment, y: Tensor) -> AdapterTerm:
    at = layer.adapters[assignment.adapter]
    assert at.tensors is not None
    kind, module, weight = layer.site.layer_kind, layer.site.module, assignment.weight
    weight = weight if isinstance(weight, float) else weight.to(y.dtype)
    if not at.adapter.method.low_rank:
        return AdapterTerm(assignment.tokens, weight, change=_change(layer, at, y.dtype))
    a, b = at.tensors[at.a].to(y.dtype), at.tensors[at.b].to(y.dtype)
    if at.tied:
        a, b = a.T, b.T
    norm = layer.norm(current, at)
    scale = None if norm is None else at.adapter.method.magnitude_scale(at.tensors, norm)
    # A tied head drops nothing: the factors belong to the embedding, where dropout does not act.
    dropout = None if at.tied else layer.dropout(current, at.adapter)
    return AdapterTerm(
        assignment.tokens,
        weight,
        lambda x_n: kind.low_rank(module, x_n, a, b) * at.scale,
        None if dropout is None else lambda x_n: drop(x_n, *dropout),
        None if scale is None else kind.per_output(scale),
        (lambda x_n: _product(layer, kind, x_n)) if dropout is not None and at.drops_base_product else None,
    )


def _change(layer: AdaptedLayer, at: AdapterAtSite, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    tensors, kind = {key: value.to(dtype) for key, value in (at.tensors or {}).items()}, layer.site.layer_kind
    return lambda x_n, y_n: at.adapter.method.change(tensors, x_n, y_n, lambda x: _product(layer, kind, x))


def _product(layer: AdaptedLayer, kind: LayerKind, x_n: Tensor) -> Tensor:
    """W x without the bias, by the base layer's own call."""
    y = layer.base_call(x_n)
    bias = kind.bias(layer.site.module)
    return y if bias is None else y - kind.per_output(bias)
