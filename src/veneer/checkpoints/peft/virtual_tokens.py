"""PEFT folders of prompt tuning and prefix tuning: a tensor, ``prompt_embeddings``, the settings of its size, and a head beside it.

prompt    [n, D]             embeddings
prefix    [n, 2 L W]         keys and values of all layers behind each other; here [n, 2 L, W]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site
from veneer.adapters.methods import TENSOR, VIRTUAL_TOKENS, VirtualTokens
from veneer.adapters.overrides import BIAS, WEIGHT
from veneer.checkpoints.base_view import BaseView, inside
from veneer.checkpoints.findings import Findings, shown

NO_BASE_SITE = "input_embedding"
"""The site of the tensor in an adapter that is read without a base."""


_PREFIX = "base_model."
"""Before the name of a layer in a file: PEFT does not wrap the base of these methods."""


def is_virtual_tokens(raw: object) -> bool:
    """True for the settings of a folder of this kind."""
    return isinstance(raw, Mapping) and raw.get("peft_type") in tuple(VIRTUAL_TOKENS)


def stored_virtual_tokens(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensor as PEFT stores it, in fp32, and the layers of a head that it has."""
    (tensors,) = adapter.tensors.values()
    head = {
        f"{_PREFIX}{layer}.{key}": value.detach().float().contiguous()
        for layer, overrides in adapter.overrides.items()
        for key, value in overrides.items()
    }
    return {TENSOR: tensors[TENSOR].detach().float().flatten(1).contiguous(), **head}


def virtual_token_settings(adapter: Adapter, base: BaseView, name: str | None, task: str | None) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    (tensors,) = adapter.tensors.values()
    tensor, method = tensors[TENSOR], adapter.method
    before = adapter.meta.get("settings") or {}
    config: Any = getattr(base.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", before.get("num_attention_heads"))
    layers = getattr(text, "num_hidden_layers", before.get("num_layers"))
    settings: dict[str, Any] = {
        "peft_type": method.peft_type,
        "auto_mapping": None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        **({"modules_to_save": sorted(adapter.overrides)} if adapter.overrides else {}),
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(tensor),
        "revision": None,
        "task_type": task,
        "token_dim": tensor.shape[-1],
    }
    if tensor.dim() == 3:
        heads = getattr(text, "num_key_value_heads", None) or heads
        return {**settings, "num_attention_heads": heads, "encoder_hidden_size": None, "prefix_projection": False}
    return {**settings, "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}


def build_virtual_tokens(
    name: str, raw: Mapping[str, Any], stored: Mapping[str, Tensor], seed: int, base: BaseView, found: Findings
) -> Adapter | None:
    """The adapter in a folder; None, with what is wrong in ``found``."""
    cls: type[VirtualTokens] = VIRTUAL_TOKENS[raw["peft_type"]]
    tensor, count = stored.get(TENSOR), raw.get("num_virtual_tokens")
    overrides = _overrides(cls, raw, stored, base, found)
    if tensor is None or tensor.dim() != 2 or not tensor.is_floating_point():
        found.refuse(
            f"expected a tensor {TENSOR} of two dimensions, found {'none' if tensor is None else tuple(tensor.shape)}"
        )
        return None
    if type(count) is not int or count != len(tensor):
        found.refuse(f"num_virtual_tokens: the settings say {shown(count)}, and {TENSOR} has {len(tensor)} rows")
    if raw.get("num_transformer_submodules") not in (None, 1):
        found.refuse("num_transformer_submodules: encoder-decoder models are not supported; expected 1")
    if not bool(torch.isfinite(tensor).all()):
        found.refuse(f"{TENSOR} has values that are not finite")
    site = next((site for site in base.sites.values() if site.is_input), None) if base.sites else None
    if base.sites and site is None:
        found.refuse(f"the base has no input embedding that {cls.name} could stand before")
    shaped = _shaped(tensor, raw, cls, site, found)
    if shaped is None or found.problems:
        return None
    at = NO_BASE_SITE if site is None else site.name
    dtype = torch.float32 if site is None else torch.promote_types(site.dtype, torch.float32)
    method = cls(num_virtual_tokens=len(tensor))
    tensors = {at: {TENSOR: shaped.to(dtype).contiguous()}}
    return Adapter(name, method, tensors, {at: "embedding"}, overrides=overrides, seed=seed)


def _overrides(
    cls: type[VirtualTokens], raw: Mapping[str, Any], stored: Mapping[str, Tensor], base: BaseView, found: Findings
) -> dict[str, dict[str, Tensor]]:
    """The layers of a head in the file: {layer: {"weight" or "bias": tensor}}."""
    declared = raw.get("modules_to_save") or ()
    names = [name for name in declared if isinstance(name, str)] if isinstance(declared, list) else []
    if not names and len(stored) > 1:
        other = next(key for key in stored if key != TENSOR)
        found.refuse(f"tensor {shown(other)} is not one of {cls.name}; expected {TENSOR} alone")
        return {}
    overrides: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        layer, _, kind = key.removeprefix(_PREFIX).rpartition(".")
        if key == TENSOR:
            continue
        if not key.startswith(_PREFIX) or kind not in (WEIGHT, BIAS) or not any(inside(layer, name) for name in names):
            found.refuse(
                f"tensor {shown(key)} is not one of {cls.name}; expected {TENSOR} and the layers in modules_to_save"
            )
        elif base.sites and base.layer(layer) is None:
            found.refuse(f"tensor {shown(key)} belongs to a layer that the base does not have")
        elif not bool(torch.isfinite(value).all()):
            found.refuse(f"{shown(key)} has values that are not finite")
        else:
            overrides.setdefault(layer, {})[kind] = value.float()
    missing = [name for name in names if not any(inside(layer, name) for layer in overrides)]
    if missing and not found.problems:
        found.refuse(
            f"modules_to_save declares {shown(missing[0])}, which the file has no tensors for: it is incomplete"
        )
    return overrides


def _shaped(
    tensor: Tensor, raw: Mapping[str, Any], cls: type[VirtualTokens], site: Site | None, found: Findings
) -> Tensor | None:
    """The tensor as the adapter holds it, where it fits the base."""
    if cls.virtual_tokens == "embeddings":
        if site is not None and tensor.shape[1] != site.geometry.out:
            found.refuse(f"{TENSOR} has rows of {tensor.shape[1]}, and the base embeds tokens in {site.geometry.out}")
        return tensor
    layers, width = raw.get("num_layers"), raw.get("token_dim")
    if type(layers) is not int or type(width) is not int or layers < 1 or 2 * layers * width != tensor.shape[1]:
        found.refuse(
            f"{TENSOR} has rows of {tensor.shape[1]}, and the settings say 2 x {shown(layers)} layers of {shown(width)} features"
        )
        return None
    if site is not None and site.key_values != (layers, width):
        have = "none of one size" if site.key_values is None else f"{site.key_values[0]} layers of {site.key_values[1]}"
        found.refuse(f"the prefix has keys and values for {layers} layers of {width} features, and the base has {have}")
    return tensor.view(len(tensor), 2 * layers, width)
