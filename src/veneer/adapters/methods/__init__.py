"""The methods: one class in one file each, found by name or by PEFT's flags in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.adapters.methods.base import factors_2d
from veneer.adapters.methods.dora import DoRA
from veneer.adapters.methods.lora import LoRA

Method = LoRA | DoRA
METHODS: dict[str, type[LoRA] | type[DoRA]] = {LoRA.name: LoRA, DoRA.name: DoRA}

__all__ = ["METHODS", "DoRA", "LoRA", "Method", "factors_2d", "method_class_for"]


def method_class_for(settings: Any) -> type[LoRA] | type[DoRA]:
    """The method whose flags these settings of PEFT have: a mapping, or an object with the keys as attributes.

    Raises KeyError where no method has them.
    """
    read = settings.get if isinstance(settings, Mapping) else lambda key: getattr(settings, key)
    for method in METHODS.values():
        if all(bool(read(key)) == value for key, value in method.flags.items()):
            return method
    raise KeyError("no method has these flags")
