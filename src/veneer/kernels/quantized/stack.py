"""The quantized weights of all experts of a stack: one fused parameter [E, rows, columns] of a module of stacked experts."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = ["QuantizedStack"]


class QuantizedStack(QuantizedLinear):
    """The rows of all experts behind each other as one quantized weight. It stands in place of a parameter, and is never called."""

    def __init__(self, weight: QuantizedWeight, count: int, dtype: torch.dtype | None = None) -> None:
        """``weight``: [E * rows, columns]; ``count``: E; ``dtype`` as of `QuantizedLinear`."""
        super().__init__(weight, dtype=dtype)
        self.count = count

    @property
    def shape(self) -> torch.Size:
        """[E, rows, columns]."""
        rows, columns = self.quantized.shape
        return torch.Size((self.count, rows // self.count, columns))

    def expert(self, number: int, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight of one expert [rows, columns], in ``dtype`` (that of the model by default); it must not outlive the call."""
        rows = self.shape[1]
        return self.quantized.dequantize(slice(number * rows, (number + 1) * rows), dtype or self.dtype)

    def __getitem__(self, number: int) -> Tensor:
        return self.expert(number)

    def dense(self) -> Tensor:
        """The weights of all experts, [E, rows, columns]."""
        return self.quantized.dequantize(dtype=self.dtype).view(self.shape)
