"""The methods: one class in one file each, found by name, by PEFT's flags or by its tensors in one table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from veneer.adapters.methods.base import factors_2d
from veneer.adapters.methods.dora import DoRA
from veneer.adapters.methods.lora import LoRA

Method = LoRA | DoRA
METHODS: dict[str, type[LoRA] | type[DoRA]] = {LoRA.name: LoRA, DoRA.name: DoRA}

__all__ = ["METHODS", "DoRA", "LoRA", "Method", "factors_2d", "method_class_for", "method_class_of_tensors"]


def method_class_for(settings: Any) -> type[LoRA] | type[DoRA]:
    """The method whose flags these settings of PEFT have: a mapping, or an object with the keys as attributes.

    Raises KeyError where no method has them.
    """
    read = settings.get if isinstance(settings, Mapping) else lambda key: getattr(settings, key)
    for method in METHODS.values():
        if all(bool(read(key)) == value for key, value in method.flags.items()):
            return method
    raise KeyError("no method has these flags")


def method_class_of_tensors(names: Collection[str], kind: str) -> type[LoRA] | type[DoRA]:
    """The method whose tensors at a site of this layer kind have exactly these names. Raises KeyError where none has them."""
    for method in METHODS.values():
        if set(method().tensor_names(kind)) == set(names):
            return method
    raise KeyError(f"no method has the tensors {sorted(names)}")
