"""Numbers of a model's parameters, those of quantized layers counted as the numbers that they stand for."""

from __future__ import annotations

from torch import nn

from veneer.kernels.quantized.bitsandbytes import quantized_layer, quantized_weight
from veneer.kernels.quantized.four_bit import NF4


def quantized_saving(model: nn.Module) -> int:
    """Bytes that the weights of linear layers inside blocks would take less in NF4; 0 for a model that is quantized."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = {layer for blocks in lists for layer in blocks.modules() if type(layer) is nn.Linear}
    if any(quantized_layer(module) for module in model.modules()):
        return 0
    return sum(int(layer.weight.numel() * (layer.weight.element_size() - NF4.bits / 8)) for layer in layers)


def parameter_count(model: nn.Module) -> int:
    """The number of parameters of the model that a quantized one stands for."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if quantized_layer(module):
            weight = quantized_weight(module)
            count += weight.shape.numel() - weight.stored.numel()
    return count
