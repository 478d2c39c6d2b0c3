"""Numbers of a model's parameters, those of quantized layers counted as the numbers that they stand for."""

from __future__ import annotations

from torch import nn

from veneer.kernels.quantized.bitsandbytes import quantized_layer, quantized_weight


def parameter_count(model: nn.Module) -> int:
    """The number of parameters of the model that a quantized one stands for."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if quantized_layer(module):
            weight = quantized_weight(module)
            count += weight.shape.numel() - weight.stored.numel()
    return count
