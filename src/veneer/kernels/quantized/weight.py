"""The contract of a quantized weight, and the size of the pieces in which it is dequantized.

A quantized weight stands for a matrix [out, in]. Its values have a data type of their own, that of the weight it was made from: numbers are
computed in fp32, rounded to that type, and then cast to the type that a layer computes in. So a layer computes with the same numbers as a
dense layer with the dequantized weight. No dense copy outlives a call.

Shapes: O out, K in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from veneer.kernels.lora.dora_norm import squared_row_norms
from veneer.kernels.quantized.native import WeightView
from veneer.kernels.versions import mark_of

ELEMENTS_AT_ONCE = 1 << 18
"""Numbers that are dequantized at once where only a reduction of them is needed."""


class QuantizedWeight:
    """A frozen weight in a format of fewer bits. Immutable; its tensors are those of the module that holds it."""

    format: ClassVar[str] = ""
    bits: ClassVar[float]
    """Bits a number, the scales of blocks included."""

    if TYPE_CHECKING:

        @property
        def shape(self) -> torch.Size:
            """[O, K]."""

        @property
        def dtype(self) -> torch.dtype:
            """Data type that values are rounded to."""

    @property
    def stored(self) -> Tensor:
        """The tensor with the packed numbers."""
        raise AssertionError

    @property
    def scales(self) -> Mapping[str, Tensor]:
        """The other tensors, by the names that follow the weight's in a file."""
        raise AssertionError

    @property
    def settings(self) -> list[object]:
        """Everything else that the numbers depend on, such as the size of a block."""
        return []

    def with_tensors(self, stored: Tensor, scales: Mapping[str, Tensor]) -> QuantizedWeight:
        """The same weight with its tensors elsewhere, such as on another device."""
        raise AssertionError

    def native(self) -> WeightView | None:
        """The weight as the kernels in C++ take it; None where they have no form of it."""
        return None

    def dequantize(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The values of some rows (all by default) as a dense [rows, K], in ``dtype`` (by default the weight's own)."""
        raise AssertionError

    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """All rows, a few at a time."""
        step = max(1, ELEMENTS_AT_ONCE // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield self.dequantize(slice(start, min(start + step, self.shape[0])), dtype)

    def squared_norms(self, dtype: torch.dtype | None = None) -> Tensor:
        """||W_o||^2 of the values in ``dtype``, [O], in fp32 or wider."""
        return torch.cat([squared_row_norms(chunk) for chunk in self.chunks(dtype)])

    def squared_error(self, weight_OK: Tensor) -> tuple[float, float]:
        """(the square of the difference from the weight that was quantized, the square of that weight's norm)."""
        lost = total = 0.0
        start = 0
        for chunk in self.chunks(torch.float32):
            exact = weight_OK[start : start + len(chunk)].float()
            lost += float((chunk - exact).double().square().sum())
            total += float(exact.double().square().sum())
            start += len(chunk)
        return lost, total

    @property
    def mark(self) -> tuple[object, ...]:
        """A key that changes when the packed numbers do."""
        return (self.format, *mark_of(self.stored))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.stored, *self.scales.values()))
