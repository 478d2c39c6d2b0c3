"""Names of a model's tensors in its files.

A checkpoint may have been saved with or without the prefix of the model's body, and transformers renames some tensors while it loads
(GPT-NeoX: embed_out in the files, lm_head in the model). transformers' own table of renamings is used. Tensors that are merged or
transposed while loading have no name in the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
        if any(converter.rename_source_key(name)[1] is not None for converter in converters):
            continue
        spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if prefix else (name,)
        spelt = next((one for one in spellings if one in own), None)
        if spelt is not None and (spelt == key or spelt not in found):
            found[spelt] = key
    return found


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
