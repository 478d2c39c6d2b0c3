"""Linear layers that hold several projections: outputs of one weight that stand for q, k and v, or for gate and up.

    qkv_proj      Phi-3                   q_proj, k_proj, v_proj
    c_attn        GPT-2                   q_proj, k_proj, v_proj
    gate_up_proj  Phi-3, GLM              gate_proj, up_proj

An adapter that names a part (``target_modules: q_proj``) acts at the fused layer, and its other outputs stay as they are: their rows of B
are zero and get no gradient. So other programs read it as an adapter of the fused layer.

A layer is taken apart only where the model's code is known to use this order; others (GPT-NeoX interleaves heads) have no parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers.site import Site

__all__ = ["fused_parts", "outside"]

_QKV, _GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_ATTENTION = {"phi3": "qkv_proj", "gpt2": "c_attn"}
"""Model types, with the name of the layer that holds q, k and v one behind the other."""
_GATE_FIRST = ("phi3", "glm", "glm4")
"""Model types whose gate_up_proj holds the gate's outputs first."""


def fused_parts(name: str, out: int, model: nn.Module) -> dict[str, slice]:
    """{part: its outputs} of a linear layer with this path and number of outputs; {} for a layer that is one projection."""
    config: Any = getattr(model, "config", None)
    kind, tail = getattr(config, "model_type", ""), name.rpartition(".")[2]
    if kind in _GATE_FIRST and tail == "gate_up_proj" and out % 2 == 0:
        return _slices(_GATED, (out // 2, out // 2))
    if _ATTENTION.get(kind) != tail or (kind == "gpt2" and "crossattention" in name):
        return {}
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    width, left = divmod(out, heads + 2 * groups)
    return {} if left else _slices(_QKV, (heads * width, groups * width, groups * width))


def outside(site: Site, chosen: tuple[str, ...]) -> Tensor:
    """True for each output [out] of a site that belongs to none of the chosen parts."""
    rest = torch.ones(site.geometry.out, dtype=torch.bool)
    for name in chosen:
        rest[site.parts[name]] = False
    return rest


def _slices(names: tuple[str, ...], sizes: tuple[int, ...]) -> dict[str, slice]:
    found, start = {}, 0
    for name, size in zip(names, sizes, strict=True):
        found[name] = slice(start, start + size)
        start += size
    return found
