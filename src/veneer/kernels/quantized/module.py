"""A linear layer whose weight is quantized.

``weight`` holds the packed numbers; the scales stay beside it and keep their data types when the model is cast. The state_dict has the
names that bitsandbytes gives: ``weight``, ``weight.absmax``, ``weight.quant_state.bitsandbytes__nf4``, or ``SCB`` for int8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.kernels.quantized.product import quantized_linear
from veneer.kernels.quantized.state import is_companion, state_of, weight_of
from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Module):
    """x W^T + b with a quantized W. The compute dtype is that of the input.

    Attributes:
        weight: the packed numbers, frozen. A dense weight that stands in its place for one call (``torch.func.functional_call``) is used.
        bias: [out], or None.
    """

    weight: nn.Parameter

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        """``dtype``: the compute dtype until the module is cast; by default that of the weight's values."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        # Casting the model casts this, and so tells the dtype that the layer computes in.
        self.register_buffer(
            "_like", torch.empty(0, dtype=dtype or weight.dtype, device=weight.stored.device), persistent=False
        )
        self.hold(weight)

    def hold(self, weight: QuantizedWeight) -> None:
        """Take another weight of the same shape."""
        self.weight = nn.Parameter(weight.stored, requires_grad=False)
        self._made = weight
        self._scales = dict(weight.scales)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight."""
        made = self._made
        if made.stored is not self.weight and made.stored.data_ptr() != self.weight.data_ptr():
            made = self._made = made.with_tensors(self.weight.detach(), self._scales)
        return made

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the layer computes in when the whole model does."""
        like = self._like
        assert isinstance(like, Tensor)
        return like.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        if self.weight.is_floating_point():
            return F.linear(x, self.weight, self.bias)
        return quantized_linear(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        made = self._made
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, format={made.format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._scales = {name: _moved(fn, scale) for name, scale in self._scales.items()}
        self._made = self._made.with_tensors(self.weight.detach(), self._scales)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.weight.is_meta:
            state = state_of(self.quantized)
            destination.update({prefix + name: value for name, value in state.items() if name != "weight"})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Take packed numbers with their scales, or a dense weight (of a merged model), which the layer then computes with."""
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        given = {key.removeprefix(prefix): value for key, value in own.items()}
        weight = given.get("weight")
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            try:
                made = weight_of(given, self._made.shape)
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")
            else:
                self.hold(
                    made.with_tensors(made.stored.clone(), {name: scale.clone() for name, scale in made.scales.items()})
                )
        elif isinstance(weight, Tensor):
            self.weight = nn.Parameter(torch.empty_like(weight, device=self.weight.device), requires_grad=False)
        rest = {key: value for key, value in own.items() if not is_companion(key.removeprefix(prefix))}
        super()._load_from_state_dict(rest, prefix, local, strict, missing, unexpected, errors)


def _moved(fn: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    """A scale on the device to which ``fn`` moves, in its own data type."""
    moved = fn(scale)
    return moved if moved.dtype == scale.dtype else scale.to(moved.device)
