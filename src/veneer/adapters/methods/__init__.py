"""The methods: one final class in one file each, found by its name in this table."""

from __future__ import annotations

from veneer.adapters.methods.dora import DoRA
from veneer.adapters.methods.lora import LoRA

Method = LoRA | DoRA
METHODS: dict[str, type[LoRA] | type[DoRA]] = {LoRA.name: LoRA, DoRA.name: DoRA}

__all__ = ["METHODS", "DoRA", "LoRA", "Method"]
