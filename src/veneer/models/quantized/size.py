"""Numbers of a model's parameters, those of quantized layers counted as the numbers that they stand for."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.kernels.quantized.bitsandbytes import quantized_layer, quantized_weight
from veneer.kernels.quantized.four_bit import NF4

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


def parameter_count(model: nn.Module) -> int:
    """The number of parameters of the model that a quantized one stands for."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if quantized_layer(module):
            held: Any = module.weight
            count += quantized_weight(module).shape.numel() - held.numel()
    return count
