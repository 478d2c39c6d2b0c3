"""Weights of torchao: nn.Linear keeps its class, and its weight is a tensor of a class of torchao that computes products in few bits.

Recognised by the class, so that the package need not be there. The layer computes its own products; norms, merging and the rest read the
weight dequantized, some rows at a time where the class can be sliced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = ["TorchaoWeight", "torchao_problem", "torchao_weight"]


class TorchaoWeight(QuantizedWeight):
    """A weight of torchao with the tensors that it consists of."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor.detach()
        self.format = f"torchao.{type(tensor).__name__}"  # type: ignore[misc]
        names, self._rest = tensor.__tensor_flatten__()
        self._parts: dict[str, Tensor] = {name: getattr(tensor, name) for name in names}
        self.bits = 8.0 * self.bytes / max(1, tensor.numel())  # type: ignore[misc]

    @property
    def shape(self) -> torch.Size:
        size: torch.Size = self.tensor.shape
        return size

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.tensor.dtype
        return dtype

    @property
    def stored(self) -> Tensor:
        return next(iter(self._parts.values()))

    @property
    def scales(self) -> Mapping[str, Tensor]:
        return dict(list(self._parts.items())[1:])

    @property
    def settings(self) -> list[object]:
        return [str(self._rest)]

    def dequantize(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        part = rows or slice(None)
        try:
            found = (self.tensor if rows is None else self.tensor[part]).dequantize()
        except RuntimeError:  # an operation that this class of torchao lacks
            found = self.tensor.dequantize()[part]
        dense: Tensor = found.to(dtype or self.dtype)
        return dense

    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        try:
            self.tensor[:1]
        except RuntimeError:  # an operation that this class of torchao lacks
            yield self.dequantize(dtype=dtype)
        else:
            yield from super().chunks(dtype)


def torchao_weight(module: nn.Module) -> Any:
    """The weight of a linear layer that is a tensor of torchao, or None."""
    weight: Any = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    kinds = type(weight).__mro__
    known = any(kind.__module__.partition(".")[0] == "torchao" for kind in kinds)
    return weight if known and hasattr(weight, "dequantize") and hasattr(weight, "__tensor_flatten__") else None


def torchao_problem(weight: Any) -> str:
    """The reason why a layer with such a weight cannot be adapted; empty if it can."""
    if getattr(weight, "act_quant_kwargs", None) is None:
        return ""
    return (
        f"its weight is torchao's {type(weight).__name__} with quantized activations, through which no gradient passes; quantize the base "
        "with a weight-only configuration"
    )
