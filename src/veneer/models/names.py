"""Names of a model's tensors in its files, and in files of earlier versions.

A checkpoint may have been saved with or without the prefix of the model's body, and transformers renames some tensors while it loads
(GPT-NeoX: embed_out in the files, lm_head in the model). transformers' own table of renamings is used. Experts that are stored one by one
and stacked while loading are found by the names that their layers would have in the model (``mlp.experts.7.up_proj.weight``). Other
tensors that are merged or transposed while loading have no name in the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from veneer.kernels.quantized.stack import QuantizedStack

_WRAPPING = frozenset({"model", "language_model", "text_model"})
"""Parts of a path that stand before the layers of a language model."""


def stored_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """{parameter or buffer of the model: its name in the files} from the files' names; what stands for nothing is left out.

    Where two names in the files mean the same parameter, the one that is spelt like it is taken, else the first.
    """
    own = set(plain_shapes(model))
    own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    renamings, converters = _conversions(model)
    found: dict[str, str] = {}
    for key in keys:
        name = _renamed(key, renamings)
        merged = [(each, *each.rename_source_key(name)) for each in converters]
        taken = next(((each, target, source) for each, target, source in merged if source is not None), None)
        if taken is not None:
            expert = _expert_name(*taken, name)
            if expert is not None:
                found.setdefault(_in_model(expert, own, prefix), key)
            continue
        spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if prefix else (name,)
        spelt = next((one for one in spellings if one in own), None)
        if spelt is not None and (spelt == key or spelt not in found):
            found[spelt] = key
    return found


def plain_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """{parameter: its shape} of a model, quantized stacks of experts under the names and with the shapes that plain ones have."""
    found = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedStack):
            del found[f"{name}.weight"]
            found[name] = module.shape
    return found


def expert_names(model: nn.Module, stacks: Iterable[str]) -> dict[str, str]:
    """{an expert's layer in the model: its name in the model's own files} of the experts in these stacks, both with ``.weight``.

    Empty for models that are not transformers' own, and without the experts that files hold stacked.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    if not isinstance(model, PreTrainedModel):
        return {}
    inside = tuple(f"{stack}." for stack in stacks)
    shapes = {name: shape for name, shape in plain_shapes(model).items() if name.startswith(inside)}
    files = revert_weight_conversion(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    return {name: file for name, file in stored_names(model, files).items() if name not in shapes}


def _expert_name(converter: Any, target: str, source: str, name: str) -> str | None:
    """The name in the model of an expert's layer that a conversion stacks, or None for any other conversion.

    converter: it turns the names ``source`` into ``target``. name: the name in the files, with the expert's number.
    """
    steps = [type(step).__name__ for step in converter.operations]
    number = re.findall(r"\.(\d+)\.", name)
    if not number or "MergeModulelist" not in steps or not set(steps) <= {"MergeModulelist", "Concatenate"}:
        return None
    stack, _, parameter = target.rpartition(".")
    if parameter == "gate_up_proj" and len(converter.source_patterns) == 2:
        parameter = ("gate_proj", "up_proj")[converter.source_patterns.index(source)]
    elif len(converter.source_patterns) != 1:
        return None
    return f"{stack}.{number[-1]}.{parameter}.weight"


def _in_model(expert: str, own: set[str], prefix: str) -> str:
    """The name of an expert's layer, with or without the prefix of the model's body, as the model has its stack."""
    stacks = {name.rpartition(".")[0] for name in own}
    for spelt in (expert, f"{prefix}.{expert}", expert.removeprefix(f"{prefix}.")):
        if spelt.rsplit(".", 3)[0] in stacks:
            return spelt
    return expert


def respelt(model: nn.Module, keys: Iterable[str]) -> dict[str, str | None]:
    """{name: a name that transformers' table turns into it} for names of the model that the table itself turns into something else.

    None where there is no such name. A program that applies the table to every file reads only the other name as this one. Empty for
    architectures that the table does not name.
    """
    renamings, _ = _conversions(model) if _in_table(model) else ([], [])
    found: dict[str, str | None] = {}
    for key in keys:
        name = _renamed(key, renamings)
        if name == key or key.endswith(name):  # a prefix that comes off is put back on where it belongs
            continue
        other = key
        for renaming in reversed(renamings):
            other = renaming.reverse_transform().rename_source_key(other)[0]
        found[key] = other if _renamed(other, renamings) == key else None
    return found


def current_layers(model: nn.Module, layers: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Today's names of layers that the model does not have under the names given.

    Returns:
        ({name: today's name} by transformers' table, {name: name here} of a text model's layers in the language model inside a
        multimodal one, or the other way). Layers that neither finds are left out.
    """
    layers = list(layers)
    stored = stored_names(model, (f"{layer}.weight" for layer in layers))
    renamed = {key.removesuffix(".weight"): name.removesuffix(".weight") for name, key in stored.items()}
    nested: dict[str, str] = {}
    decoder: Any = model
    while hasattr(decoder, "get_decoder") and decoder.get_decoder() not in (None, decoder):
        decoder = decoder.get_decoder()  # of a multimodal model's language model with its own head (Llama 4)
    path = next((name for name, module in model.named_modules() if module is decoder), None)
    own = {name for name, _ in model.named_modules()}
    for layer in layers if path is not None else ():
        parts = layer.split(".")
        depth = next((at for at, part in enumerate(parts) if part not in _WRAPPING), len(parts))
        tail = ".".join(parts[depth:])
        spellings = (f"{path}.{tail}" if path else tail, tail)
        found = next((name for name in spellings if name in own), None)
        if layer not in renamed and found is not None:
            nested[layer] = found
    return renamed, nested


def conversion_family(model: nn.Module) -> str:
    """The architecture whose experts' names transformers' table applies to this model ("qwen2_moe" for DeepSeek-V3); "" for most."""
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as FAMILIES
    except ImportError:
        return ""
    return str(FAMILIES.get(kind, ""))


def _in_table(model: nn.Module) -> bool:
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return False
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind is not None and get_checkpoint_conversion_mapping(kind) is not None


def _renamed(key: str, renamings: Iterable[Any]) -> str:
    for renaming in renamings:
        key = renaming.rename_source_key(key)[0]
    return key


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """(renamings, conversions of tensors) that transformers applies while it loads this model; empty for models that are not its own."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return [], []
    if not isinstance(model, PreTrainedModel):
        return [], []
    steps: list[Any] = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    return renamings, [step for step in steps if step not in renamings]
