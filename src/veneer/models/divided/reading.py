"""Reading a base in parts: each process reads its part of every weight from the files, and no other.

transformers' loader builds the model on the meta device, where it takes no memory. There it is divided (``sharding.py``), and the loader
fills each part with its rows of the files, one tensor at a time. Its hook for this moment is that of quantized models.

Files that hold another weight than the model (one that is split, joined by rows or turned while it is read) are read whole, and the model
is divided afterwards. Experts that are stored one by one are not among them: a part of a stack is some of the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from veneer._imports import light_imports

with light_imports():
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["read_in_parts"]

_METHOD = "veneer_parts"


def read_in_parts(
    load: Callable[..., Any], divide: Callable[[nn.Module], None], there: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any], bool]:
    """Load a model of which this process has a part.

    Args:
        load: calls ``from_pretrained`` with more arguments.
        divide: leaves this process its part of a model's weights.
        there: the argument that names the device of the weights.

    Returns:
        The model, what ``from_pretrained`` tells of it, and True if it is divided; else it is whole and on the CPU.
    """
    _Reading.divide = divide
    try:
        return (*load(quantization_config=_PartsConfig(), **there), True)
    except _NotByParts:
        return (*load(), False)
    finally:
        _Reading.divide = None


class _NotByParts(Exception):
    """A part of the model is made of more than the same part of the files."""


class _Reading:
    """The load that is in progress; transformers makes the object that its hooks belong to."""

    divide: Callable[[nn.Module], None] | None = None


def _by_parts(conversion: Any) -> bool:
    """True if a part of the model's weight is made of the same part of the files' weights."""
    if not isinstance(conversion, WeightConverter):
        return True
    first, *others = conversion.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(one, Concatenate) and one.dim > 0 for one in others)


def _stacks_reach(model: nn.Module) -> bool:
    """True if each process has at least one expert of every stack."""
    size = torch.distributed.get_world_size()
    counts = {weight.shape[0] for weight in model.parameters() if weight.dim() == 3}
    return all(-(-count // size) * (size - 1) < count for count in counts)


class _PartsConfig(QuantizationConfigMixin):
    def __init__(self, **unused: Any) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]


class _PartsQuantizer(HfQuantizer):
    """transformers' hooks; nothing is quantized."""

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """The conversions as they are; the model is complete now, and has no weights yet."""
        if not all(map(_by_parts, weight_conversions)) or not _stacks_reach(model):
            raise _NotByParts
        assert _Reading.divide is not None
        _Reading.divide(model)
        return weight_conversions

    def postprocess_model(self, model: Any, **options: Any) -> Any:
        """Make the model one like others."""
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = _PartsConfig
auto.AUTO_QUANTIZER_MAPPING[_METHOD] = _PartsQuantizer
