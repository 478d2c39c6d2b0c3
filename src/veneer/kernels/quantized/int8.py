"""int8 by rows, as bitsandbytes stores it for LLM.int8(): w = q * absmax[row] / 127 (Dettmers et al. 2022, arXiv 2208.07339).

bitsandbytes also quantizes the inputs of such a layer and takes outliers apart; here the dequantized weight is multiplied with the inputs
as they are, which is more exact and has a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from veneer.kernels.quantized.native import EIGHT_BITS, WeightView, dequantize_rows, view_of
from veneer.kernels.quantized.weight import QuantizedWeight

_INVERSE = 7.874015718698502e-3
"""1 / 127 as bitsandbytes has it."""


@dataclass(frozen=True, eq=False)
class Int8(QuantizedWeight):
    """A weight of eight bits a number: values int8 [O, K], absmax fp32 [O]."""

    format: ClassVar[str] = "int8"
    bits: ClassVar[float] = 8.0
    dtype: ClassVar[torch.dtype] = torch.float32

    values: Tensor
    absmax: Tensor

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight_OK: Tensor) -> Int8:
        """Quantize a weight, rounded to fp16 first as bitsandbytes does."""
        half = weight_OK.to(torch.float16)
        absmax = half.abs().amax(1).float()
        values = torch.round(half * (127.0 / absmax.unsqueeze(1))).nan_to_num(0).to(torch.int8)
        return cls(values, absmax)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def stored(self) -> Tensor:
        return self.values

    @property
    def scales(self) -> Mapping[str, Tensor]:
        return {"SCB": self.absmax}

    def with_tensors(self, stored: Tensor, scales: Mapping[str, Tensor]) -> Int8:
        return replace(self, values=stored, absmax=scales["SCB"])

    def native(self) -> WeightView | None:
        return view_of(EIGHT_BITS, self.values.shape[1], self.values, self.absmax, scale=_INVERSE)

    def dequantize(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        part = rows or slice(None)
        start, stop, _ = part.indices(len(self.values))
        found = dequantize_rows(self.native(), start, max(start, stop), dtype or self.dtype)
        if found is None:
            exact = self.values[part].float().mul_(self.absmax[part].unsqueeze(1)).mul_(_INVERSE)
            found = exact.to(dtype or self.dtype)
        return found
