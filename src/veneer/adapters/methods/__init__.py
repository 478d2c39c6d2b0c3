"""The methods: one class in one file each, found by name or by PEFT's flags in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.adapters.methods.base import Method
from veneer.adapters.methods.bitfit import BitFit
from veneer.adapters.methods.bottleneck import Houlsby, Pfeiffer
from veneer.adapters.methods.dora import DoRA
from veneer.adapters.methods.full import Full
from veneer.adapters.methods.ia3 import IA3
from veneer.adapters.methods.lora import LoRA
from veneer.adapters.methods.low_rank import LowRankMethod, factors_2d, low_rank
from veneer.adapters.methods.prefix import PrefixTuning
from veneer.adapters.methods.prompt import PromptTuning
from veneer.adapters.methods.vera import VeRA
from veneer.adapters.methods.virtual_tokens import TENSOR, VirtualTokens

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (LoRA, DoRA, Full, BitFit, IA3, Houlsby, Pfeiffer, VeRA, PrefixTuning, PromptTuning)
}
VIRTUAL_TOKENS: dict[str, type[VirtualTokens]] = {
    method.peft_type: method for method in METHODS.values() if issubclass(method, VirtualTokens)
}
"""The methods that put virtual tokens before the sequence, by PEFT's name."""
LOW_RANK: dict[str, type[LowRankMethod]] = {
    name: method for name, method in METHODS.items() if issubclass(method, LowRankMethod)
}
"""The methods that low-rank factors can be written as."""
OPTIONS = frozenset(name for method in METHODS.values() for name in method.model_fields)
"""Options that some method has."""

__all__ = [
    "IA3",
    "LOW_RANK",
    "METHODS",
    "OPTIONS",
    "TENSOR",
    "VIRTUAL_TOKENS",
    "BitFit",
    "DoRA",
    "Full",
    "Houlsby",
    "LoRA",
    "LowRankMethod",
    "Method",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "VeRA",
    "VirtualTokens",
    "factors_2d",
    "has_option",
    "low_rank",
    "method_class_for",
]


def has_option(method: str, option: str) -> bool:
    """False for an option that belongs to other methods than the one of this name."""
    return option not in OPTIONS or option in METHODS[method].model_fields


def method_class_for(settings: Any, recorded: object = None) -> type[Method]:
    """The method whose ``peft_type`` and flags these settings of PEFT have: a mapping, or an object with the keys as attributes.

    recorded: the name of the method in a receipt, by which methods without flags are found.
    Raises KeyError where no method has them.
    """
    read = settings.get if isinstance(settings, Mapping) else lambda key: getattr(settings, key)
    kind = read("peft_type") or LoRA.peft_type
    same = [method for method in METHODS.values() if method.peft_type == kind]
    for method in same:
        if not method.flags and (method.name == recorded or len(same) == 1):
            return method
    for method in same:
        if method.flags and all(bool(read(key)) == value for key, value in method.flags.items()):
            return method
    raise KeyError("no method has these flags")
