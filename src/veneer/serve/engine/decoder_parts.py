"""Finds the parts of a decoder in Llama's form in a model, for the kernel that decodes (``kernels/decoding.py``).

Parts are found by their usual names and shapes, which proves nothing: the caller compares the kernel's result with the model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.kernels.decoding import LINEARS, DecoderWeights, LayerWeights
from veneer.kernels.quantized.bitsandbytes import quantized_layer, quantized_weight

__all__ = ["decoder_modules", "decoder_weights", "rotation_table"]


def decoder_modules(model: Any) -> dict[int, tuple[int, str]]:
    """{id of a linear module: (layer, its name in `LINEARS`)}; empty where the model has other parts."""
    try:
        return {
            id(module): (number, name)
            for number, layer in enumerate(model.model.layers)
            for name, module in _linears(layer).items()
        }
    except AttributeError:
        return {}


def decoder_weights(model: Any, scale: float) -> DecoderWeights | None:
    """The weights of a decoder in Llama's form whose scores are multiplied by ``scale``; None where the model has other parts."""
    try:
        body, head = model.model, model.get_output_embeddings()
        first = body.layers[0]
        size = int(first.self_attn.head_dim)
        if getattr(head, "bias", None) is not None or _extra(first):
            return None
        found = DecoderWeights(
            [_layer(layer) for layer in body.layers],
            body.embed_tokens.weight.detach(),
            body.norm.weight.detach(),
            head.weight.detach(),
            heads=first.self_attn.q_proj.out_features // size,
            groups=first.self_attn.k_proj.out_features // size,
            size=size,
            eps=_eps(first.input_layernorm),
            scale=scale,
        )
    except (AttributeError, IndexError, TypeError):
        return None
    return found if found.fits() else None


@torch.no_grad()
def rotation_table(model: Any, positions: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [positions, D] in fp32, as the model rounds them."""
    weight = model.model.embed_tokens.weight
    cos, sin = model.model.rotary_emb(weight[:1, None], torch.arange(positions)[None])
    return cos[0].float().contiguous(), sin[0].float().contiguous()


def _linears(layer: Any) -> dict[str, Any]:
    attention, gated = layer.self_attn, layer.mlp
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return dict(zip(LINEARS, (*modules, gated.gate_proj, gated.up_proj, gated.down_proj), strict=True))


def _extra(layer: Any) -> bool:
    """True if a layer has parts that the kernel does not know."""
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    inner = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    weighted = {name.split(".")[0] for name, _ in layer.named_parameters()}
    attention = {name.split(".")[0] for name, _ in layer.self_attn.named_parameters()}
    return not weighted <= known or not attention <= inner


def _layer(layer: Any) -> LayerWeights:
    linears = _linears(layer)
    attention = layer.self_attn
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return LayerWeights(
        {
            name: quantized_weight(module) if quantized_layer(module) else module.weight.detach()
            for name, module in linears.items()
        },
        {name: None if module.bias is None else module.bias.detach() for name, module in linears.items()},
        layer.input_layernorm.weight.detach(),
        layer.post_attention_layernorm.weight.detach(),
        *(None if norm is None else norm.weight.detach() for norm in norms),
    )


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
