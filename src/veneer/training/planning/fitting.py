"""Settings of a run that fit into so much memory, from a base's config.json alone: no weights and no examples are needed.

The model is built on torch's meta device, so counts of numbers are exact; activations are those that the forms of this package keep for
backward in a decoder block of hidden size H, key and value width V and intermediate size I, for each token:

    without activation checkpointing    layers * (6 H + 2 V + 3 I), and what DoRA keeps of outputs: 2 H
    with it                             layers * H, and one layer's

The largest group of layers that share an input is dequantized at once. Masters, gradients and AdamW's moments take 16 bytes a trained
number.
A run measures before its first step (`plan.py`), which counts more than these estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.survey import survey
from veneer.adapters.methods import LOW_RANK, LowRankMethod
from veneer.models.load import model_class
from veneer.models.quantized.loading import quantized_names
from veneer.models.quantized.size import stack_names

PRECISIONS = ("bfloat16", "int8", "nf4")
"""Formats of the base, the most exact first."""
TOKENS = (8192, 4096, 2048, 1024, 512, 256)
ENOUGH = 1024
"""Tokens of a pass from which on more make it little faster."""
_BITS = {"bfloat16": 16.0, "int8": 8.03, "nf4": 4.127}
_TRAINED = 16
"""Bytes a trained number: fp32 master, gradient and two moments."""
_PROCESS = 600_000_000
"""The process itself: Python, torch, transformers, and buffers of the loss."""
_KEPT = 2.6
"""Bytes of an activation in bf16, with what the C library's heap holds between activations (docs/log/quantized.md)."""
_STEP = 4
"""Activations' gradients in flight in a layer's backward, as a share of what one layer keeps."""


@dataclass(frozen=True)
class Shape:
    """Numbers of a base: in linear layers that can be quantized, in all other parameters; sizes of a decoder block; layers."""

    linear: int
    other: int
    hidden: int
    values: int
    intermediate: int
    layers: int
    widest: int
    """Numbers of the largest layers that share an input."""
    sites: tuple[Geometry, ...]
    """The layers that an adapter acts on."""


@dataclass(frozen=True)
class Setting:
    """One row of the table, with its estimate in bytes."""

    quantize: str
    r: int
    checkpointing: bool
    tokens: int
    memory: int
    fits: bool
    seconds: float | None = None
    """Seconds for 1,000 tokens on this machine, where they were measured."""

    def flags(self) -> list[str]:
        """The flags of ``veneer train`` that choose it."""
        base = ["--dtype", "bfloat16"] if self.quantize == "bfloat16" else ["--quantize", self.quantize]
        again = ["--activation-checkpointing", "true"] if self.checkpointing else []
        return [*base, "--r", str(self.r), *again, "--tokens-per-pass", str(self.tokens)]


def shape_of(folder: Path, method: str) -> Shape:
    """The shape of the base in a folder, of which only the config.json is read."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cls = model_class(folder)
    with torch.device("meta"):
        model: Any = getattr(cls, "from_config", cls)(config)
    text = config.get_text_config()
    known = dict(model.named_parameters())
    linear = {name: model.get_submodule(name).weight.numel() for name in quantized_names(model, None)}
    layers = list(linear.values())
    linear |= {name: known[name].numel() for name in stack_names(model)}
    total = sum(parameter.numel() for parameter in model.parameters())
    hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "n_embd", 0))
    intermediate = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    heads = int(getattr(text, "num_attention_heads", 0) or getattr(text, "n_head", 1))
    width = int(getattr(text, "head_dim", 0) or hidden // heads)
    found = survey(model)
    options = LOW_RANK[method]()
    chosen = [found.sites[name].geometry for name in options.choose(found)]
    return Shape(
        linear=sum(linear.values()),
        other=total - sum(linear.values()),
        hidden=hidden,
        values=width * int(getattr(text, "num_key_value_heads", 0) or heads),
        intermediate=intermediate,
        layers=int(getattr(text, "num_hidden_layers", 0) or getattr(text, "n_layer", 1)),
        widest=max(2 * hidden * intermediate, max(layers, default=0)),
        sites=tuple(chosen),
    )


def memory_of(
    shape: Shape, quantize: str, method: type[LowRankMethod], r: int, tokens: int, *, checkpointing: bool
) -> int:
    """The estimated peak of a training process, in bytes."""
    weights = int(shape.linear * _BITS[quantize] / 8) + 2 * shape.other
    dequantized = 0 if quantize == "bfloat16" else 2 * shape.widest
    tensors = [method().shapes_of_rank(geometry, r).values() for geometry in shape.sites]
    trained = sum(math.prod(size) for shapes in tensors for size in shapes)
    outputs = 2 * shape.hidden if method.keeps_output else 0
    layer = 6 * shape.hidden + 2 * shape.values + 3 * shape.intermediate + outputs
    kept = shape.layers * shape.hidden + layer if checkpointing else shape.layers * layer
    in_flight = _STEP * shape.intermediate
    return _PROCESS + weights + dequantized + _TRAINED * trained + int(_KEPT * tokens * (kept + in_flight))


def settings(shape: Shape, memory: int, method: str, ranks: Sequence[int]) -> list[Setting]:
    """For each precision, rank, and with and without checkpointing: the most tokens in a pass that fit, or the fewest where none do."""
    found = []
    for quantize in PRECISIONS:
        for r in ranks:
            for checkpointing in (False, True):
                estimates = [
                    (memory_of(shape, quantize, LOW_RANK[method], r, n, checkpointing=checkpointing), n) for n in TOKENS
                ]
                bytes_, tokens = next(((size, n) for size, n in estimates if size <= memory), estimates[-1])
                found.append(Setting(quantize, r, checkpointing, tokens, bytes_, bytes_ <= memory))
    return found


def best(rows: Sequence[Setting]) -> Setting | None:
    """The row to train with: enough tokens a pass before a more exact base, a more exact base before more tokens; None if none fits."""
    fitting = [row for row in rows if row.fits]
    order = {name: number for number, name in enumerate(PRECISIONS)}
    return min(
        fitting,
        key=lambda row: (row.tokens < ENOUGH, order[row.quantize], row.checkpointing, -row.tokens, -row.r),
        default=None,
    )
