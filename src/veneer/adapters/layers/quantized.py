"""The layer kind of quantized linear layers: adapters see a linear layer, and its weight is dequantized where it is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import LayerKind
from veneer.kernels.quantized.bitsandbytes import quantized_weight
from veneer.kernels.quantized.weight import QuantizedWeight


class QuantizedLinearKind(LayerKind):
    """A linear layer with a quantized weight: this package's own, or one of bitsandbytes.

    `dense` and `weight_2d` dequantize all of it, for callers that need the matrix once (a merge, an SVD); the result must not outlive the
    call.
    """

    def dense(self, module: Any) -> Tensor:
        return quantized_weight(module).dequantize(dtype=self.dtype(module))

    def quantized(self, module: Any) -> QuantizedWeight | None:
        return quantized_weight(module)

    def squared_norms(self, module: Any) -> Tensor:
        return quantized_weight(module).squared_norms(self.dtype(module))

    def dtype(self, module: Any) -> torch.dtype:
        # A layer of bitsandbytes computes in the type of its values until its first call decides.
        known = getattr(module, "dtype", None) or getattr(module, "compute_dtype", None)
        return known if isinstance(known, torch.dtype) else quantized_weight(module).dtype
