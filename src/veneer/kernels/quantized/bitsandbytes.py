"""Layers of bitsandbytes inside a model: recognised by class name, so that the package need not be there, and read as quantized weights.

`QuantizedLinear` and layers with torchao's weights answer here too, so callers ask one function for the weight of a quantized layer.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from veneer.kernels.quantized.four_bit import FourBit
from veneer.kernels.quantized.int8 import Int8
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.state import FORMATS
from veneer.kernels.quantized.torchao import TorchaoWeight, torchao_weight
from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = ["keep_packing", "quantized_layer", "quantized_weight"]


def quantized_layer(module: nn.Module) -> bool:
    """True for a `QuantizedLinear`, and for a linear layer whose weight bitsandbytes or torchao has quantized."""
    if isinstance(module, QuantizedLinear) or torchao_weight(module) is not None:
        return True
    weight: Any = module._parameters.get("weight")
    if _is_class(module, "Linear4bit"):
        return getattr(weight, "quant_state", None) is not None
    return _is_class(module, "Linear8bitLt") and weight is not None and weight.dtype == torch.int8


def quantized_weight(module: Any) -> QuantizedWeight:
    """The weight of such a layer; its tensors are shared with the layer."""
    if isinstance(module, QuantizedLinear):
        return module.quantized
    if (tensor := torchao_weight(module)) is not None:
        return TorchaoWeight(tensor)
    if _is_class(module, "Linear8bitLt"):
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return Int8(module.weight.data, scale)
    state = module.weight.quant_state
    made = FORMATS[state.quant_type]
    assert issubclass(made, FourBit)
    packed = module.weight.data.view(torch.uint8).view(-1, 1)
    nested = {} if state.state2 is None else {"outer": state.state2.absmax, "offset": float(state.offset)}
    return made(packed, state.absmax, torch.Size(state.shape), state.dtype, state.blocksize, **nested)


def keep_packing(module: Any) -> None:
    """Keep a 4-bit layer of bitsandbytes from packing its weight in another order.

    On processors with AVX512-BF16 its forward does so in place in eval mode, after which gradients of the input are lost and its own
    dequantization is wrong. A weight that has been packed so before is put back, by the function that saves it; its scales were rounded to
    bfloat16, which a warning says.
    """
    if not _is_class(module, "Linear4bit"):
        return
    module.support_avx512bf16_for_cpu = False
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        module.state_dict()
        warnings.warn(
            "bitsandbytes packed the weights of this model for its own CPU kernel, which rounded their scales to bfloat16; attach "
            "before the model runs in eval mode, or load it again, to train on the weights as they are stored",
            stacklevel=2,
        )


def _is_class(module: Any, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__)
