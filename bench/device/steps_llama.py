"""A training step on Llama-3-8B's shape, in bf16 and in NF4."""

from __future__ import annotations

from collections.abc import Iterator

from bench.device.shapes import to_nf4
from bench.device.steps import RANK, Place, compare, ours, place_of
from bench.device.supervise import Row, Setting
from veneer.adapters import DoRA, LoRA


def run(setting: Setting) -> Iterator[Row]:
    """The plain base first; it is then quantized in place, where PEFT has no layer of ours to adapt."""
    place = place_of("llama", setting)
    yield from compare(place)
    quantized = Place(setting, to_nf4(place.model), place.rows, place.flops)
    for method in (LoRA, DoRA):
        yield ours(quantized, method(r=RANK, lora_alpha=2 * RANK), "NF4: ")[0]
