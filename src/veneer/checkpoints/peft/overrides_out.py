"""Values of an adapter's own on their way into a PEFT folder: tensors under PEFT's names, and the settings that declare them.

weight, bias      <place>.weight, <place>.bias                           modules_to_save
bias              <site>.base_layer.bias, or <place>.bias                bias
lora_bias         <site>.lora_B.bias                                     lora_bias
rows              <place>.token_adapter.trainable_tokens_delta           trainable_token_indices
weight beside     <site>.base_layer.weight                               (PEFT declares none of these)
factors
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.bank import Bank
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.adapters.targets import as_list
from veneer.checkpoints.peft.overrides_in import inside
from veneer.checkpoints.peft.tensor_names import PREFIX


def stored_own(adapter: Adapter, bank: Bank | None) -> dict[str, Tensor]:
    """{PEFT's name: tensor in fp32} of everything that is the adapter's own. Rows that two places share come once."""
    found: dict[str, Tensor] = {}
    rows: set[int] = set()
    for place, own in adapter.overrides.items():
        beside = ".base_layer" if place in adapter.tensors else ""
        for key, value in own.items():
            stored = value.detach().float().contiguous()
            if key == LORA_BIAS:
                found[f"{PREFIX}{place}.lora_B.bias"] = stored
            elif key == ROWS:
                if id(value) not in rows:
                    found[f"{PREFIX}{place}.token_adapter.trainable_tokens_delta"] = stored
                rows.add(id(value))
            else:
                found[f"{PREFIX}{place}{beside}.{key}"] = stored
        if bank is not None and WEIGHT in own and not beside:
            # PEFT wants a saved layer whole: what of it the adapter has not is the base's.
            site = bank.sites.get(place) or bank.vector_layers[place]
            for key, parameter in site.module.named_parameters(recurse=False):
                found.setdefault(f"{PREFIX}{place}.{key}", parameter.detach().float().contiguous())
    return found


def own_settings(adapter: Adapter, bank: Bank | None) -> dict[str, Any]:
    """The settings that declare what is the adapter's own."""
    biased = [place for place, own in adapter.overrides.items() if BIAS in own and WEIGHT not in own]
    bias = "none" if not biased else "lora_only" if all(place in adapter.tensors for place in biased) else "all"
    if biased and adapter.method.bias == "all":
        bias = "all"
    return {
        "modules_to_save": _saved(adapter, bank) or None,
        "bias": bias,
        "lora_bias": any(LORA_BIAS in own for own in adapter.overrides.values()),
        "trainable_token_indices": _tokens(adapter, bank),
    }


def _saved(adapter: Adapter, bank: Bank | None) -> list[str]:
    """Names for ``modules_to_save``: those of the adapter's options if they mean exactly its own layers, else full paths."""
    places = [place for place, own in adapter.overrides.items() if WEIGHT in own and place not in adapter.tensors]
    names = list(as_list(adapter.method.modules_to_save))
    if bank is not None and names:
        layers = [*bank.sites, *bank.vector_layers]
        if {layer for layer in layers if any(inside(layer, name) for name in names)} == set(places):
            return sorted(names)
    return sorted(places)


def _tokens(adapter: Adapter, bank: Bank | None) -> list[int] | dict[str, list[int]] | None:
    """A list for the input embedding (and a head tied to it), which PEFT finds by itself; otherwise a table by name."""
    distinct: dict[int, tuple[str, tuple[int, ...]]] = {}
    for place, own in adapter.overrides.items():
        if ROWS in own:
            distinct.setdefault(id(own[ROWS]), (place, adapter.tokens[place]))
    if not distinct:
        return None
    if len(distinct) == 1:
        place, ids = next(iter(distinct.values()))
        get = getattr(bank.model, "get_input_embeddings", None) if bank is not None else None
        if bank is None or (callable(get) and get() is bank.sites[place].module):
            return list(ids)
    return {place: list(ids) for place, ids in distinct.values()}
