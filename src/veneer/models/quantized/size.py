"""Numbers of a model's parameters, those of quantized layers counted as the numbers that they stand for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from veneer.kernels.quantized.bitsandbytes import quantized_layer, quantized_weight
from veneer.kernels.quantized.four_bit import NF4
from veneer.kernels.quantized.state import FORMATS
from veneer.models.quantized.scheme import Scheme, read_scheme
from veneer.models.sources import read_config

_FLAGS = ("is_transposed", "has_bias", "has_gate")


def stack_names(model: nn.Module) -> list[str]:
    """The parameters of a model's stacked experts that can be quantized; none of Llama 4's, whose forward takes plain ones only."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and key in ("gate_up_proj", "up_proj", "down_proj")
    ]


def quantized_saving(model: nn.Module) -> int:
    """Bytes that the weights of linear layers inside blocks, and of stacked experts, would take less in NF4; 0 for a model that is
    quantized."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = {layer for blocks in lists for layer in blocks.modules() if type(layer) is nn.Linear}
    if any(quantized_layer(module) for module in model.modules()):
        return 0
    known = dict(model.named_parameters())
    weights = [*(layer.weight for layer in layers), *(known[name] for name in stack_names(model))]
    return sum(int(weight.numel() * (weight.element_size() - NF4.bits / 8)) for weight in weights)


def size_in_memory(folder: Path, dtype: torch.dtype, quantize: str | None) -> int:
    """Bytes that the weights in a folder take once they are loaded, by the tables of their files.

    dtype: of weights that are not quantized. quantize: the format to which linear layers are quantized while they are read.
    """
    config = read_config(folder)
    if quantize is None and isinstance(read_scheme(config, folder), Scheme):
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    bits = None if quantize is None else FORMATS[quantize].bits
    total = 0.0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(name).get_shape()
                narrow = bits is not None and len(shape) == 2 and shape[0] != vocabulary
                total += math.prod(shape) * (bits / 8 if narrow and bits is not None else dtype.itemsize)
    return int(total)


def parameter_count(model: nn.Module) -> int:
    """The number of parameters of the model that a quantized one stands for."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if quantized_layer(module):
            held: Any = module.weight
            count += quantized_weight(module).shape.numel() - held.numel()
    return count
