"""Names of a model's tensors in its files.

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


def stored_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """{parameter or buffer of the model: its name in the files} from the files' names; what stands for nothing is left out.

    Where two names in the files mean the same parameter, the one that is spelt like it is taken, else the first.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    renamings, converters = _conversions(model)
    found: dict[str, str] = {}
    for key in keys:
        name = key
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
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
    shapes = {name: value.shape for name, value in model.named_parameters() if name.startswith(inside)}
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
