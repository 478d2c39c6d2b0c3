"""The override path: weights, biases and rows that replace those of the base for one adapter's tokens.

A layer's output y for an adapter's tokens becomes

    weight      f(x; W')                      the layer's own computation with the adapter's weight
    bias        y + (b' - b)
    rows        the rows of some tokens: of an embedding when they are looked up, of a head as their logits
    lora_bias   y + s c                       a bias of B, scaled with it

and in a weighted mix y + sum_j w_tj (y_j - y). The base's tensors are only read. The heads of classifiers may have different numbers of
labels in one batch: the output is as wide as the widest, and -inf where a row has no such label.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT, computed_with
from veneer.adapters.runtime.forward_pass import ForwardPass
from veneer.adapters.runtime.layer import AdaptedLayer
from veneer.adapters.runtime.plan import Assignment
from veneer.errors import RouteError


def with_overrides(
    layer: AdaptedLayer, current: ForwardPass, assignments: Iterable[Assignment], x: Tensor, y: Tensor, *, plain: bool
) -> Tensor:
    """A layer's output with the overrides of each assignment's adapter. ``plain``: ``y`` is the base layer's own output."""
    site = layer.site
    x_N = site.layer_kind.flatten(x)
    y_N = y.reshape(x_N.shape[0], *y.shape[y.dim() - site.layer_kind.output_dims :])
    out = y_N
    for name, tokens, weight, *_ in assignments:
        x_n = x_N if tokens is None else x_N.index_select(0, tokens)
        if plain:
            base_n = y_N if tokens is None else y_N.index_select(0, tokens)
        else:
            base_n = layer.base_call(x_n)
        new_n = _output(layer.adapters[name].adapter, site, x_n, base_n)
        if plain and current.plan.exclusive and isinstance(weight, float) and weight == 1.0:
            # No other adapter acts on these tokens: they take the new values themselves, without a sum to round.
            if tokens is None:
                out = new_n
                continue
            if new_n.shape[-1] != out.shape[-1]:
                out, new_n = _widened(out, new_n)
            out = out.index_copy(0, tokens, new_n.to(out.dtype))
            continue
        if new_n.shape != base_n.shape:
            raise RouteError(
                f"{site.name}: heads with different numbers of labels cannot be mixed, because their outputs mean different things; route "
                "each row to one adapter"
            )
        change = new_n - base_n
        change = change * (
            weight.to(change.dtype).reshape(-1, *[1] * (change.dim() - 1)) if isinstance(weight, Tensor) else weight
        )
        out = out + change if tokens is None else out.index_add(0, tokens, change.to(out.dtype))
    return out.reshape(*y.shape[: y.dim() - site.layer_kind.output_dims], *out.shape[1:])


def _widened(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of two heads, the narrower one filled up with -inf: labels that it does not have."""
    width = max(one.shape[-1], other.shape[-1])
    narrow, wide = (F.pad(y, (0, width - y.shape[-1]), value=-torch.inf) for y in (one, other))
    return narrow, wide


def _output(adapter: Adapter, site: Site, x_n: Tensor, y_n: Tensor) -> Tensor:
    tensors, module, dtype = adapter.overrides[site.name], site.module, y_n.dtype
    out = y_n
    values = {key: tensors[key].to(dtype) for key in (WEIGHT, BIAS) if key in tensors}
    if WEIGHT in tensors or (values and site.kind == "vector_layer"):
        out = computed_with(module, values, x_n)
    elif BIAS in tensors:
        base: Any = module.bias
        out = out + site.layer_kind.per_output(values[BIAS] - base)
    if ROWS in tensors:
        out = _with_rows(site, tensors[ROWS].to(dtype), adapter.tokens[site.name], x_n, out)
    if LORA_BIAS in tensors:
        out = out + adapter.scale(site.name) * site.layer_kind.per_output(tensors[LORA_BIAS].to(dtype))
    return out


def _with_rows(site: Site, rows_nD: Tensor, tokens: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    ids = torch.tensor(tokens, device=y.device)
    if site.kind != "embedding":
        bias: Any = site.module.bias
        return y.index_copy(1, ids, F.linear(x, rows_nD, None if bias is None else bias[ids]))
    ascending, order = ids.sort()
    at = torch.searchsorted(ascending, x).clamp_max(len(tokens) - 1)
    hit = ascending[at] == x
    scale = getattr(site.module, "embed_scale", None)
    rows_nD = rows_nD if scale is None else rows_nD * torch.as_tensor(scale).to(rows_nD)
    return torch.where(hit.unsqueeze(1), rows_nD[order[at]], y)
