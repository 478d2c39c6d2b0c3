"""A plain folder seen as the base that ``--quantize`` makes of it: each weight quantized when it is asked for, and dequantized again.

An adapter that was trained with ``--quantize nf4`` was fitted to these weights, so merging and composing take them for the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.checkpoints.model_folder import ModelFolder
from veneer.kernels.quantized.state import quantize
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.models.quantized.scheme import Scheme

__all__ = ["QuantizedParameter", "QuantizedReading"]

_STACKS = 3
"""Stacks of experts kept dequantized, since files that hold experts one by one are read expert by expert."""


@dataclass(frozen=True, eq=False)
class QuantizedParameter:
    """A parameter that is quantized as a whole.

    Attributes:
        name: in the model.
        shape: in the model.
        turned: it is stored [in, out], and quantized as [out, in].
        places: tensor in the files -> a function from the parameter to the view of it that the tensor fills.
    """

    name: str
    shape: torch.Size
    turned: bool
    places: Mapping[str, Callable[[Tensor], Tensor]]


class QuantizedReading(ModelFolder):
    """A folder of plain weights, some of which have the values that they have in a quantized format."""

    def __init__(self, plain: ModelFolder, scheme: Scheme, parameters: Mapping[str, QuantizedParameter]) -> None:
        """``parameters``: tensor in the files -> the parameter that it is part of."""
        super().__init__(plain.path)
        self.config, self.files = plain.config, plain.files
        self.plain = plain
        self.scheme = scheme
        self.parameters = parameters
        self._lost: dict[int, tuple[float, float]] = {}
        self._stacks: dict[int, Tensor] = {}

    @property
    def error(self) -> float:
        """The difference of the weights read so far from those in the files, as a share of their norm."""
        lost, total = (sum(part) for part in zip(*self._lost.values(), strict=True)) if self._lost else (0.0, 0.0)
        return math.sqrt(lost / total) if total else 0.0

    def quantized(self, key: str) -> QuantizedWeight | None:
        parameter = self.parameters.get(key)
        return None if parameter is None or len(parameter.places) > 1 else self._quantize(parameter)[1]

    def format(self, key: str) -> str | None:
        return self.scheme.format if key in self.parameters else None

    def get(self, key: str) -> Tensor:
        parameter = self.parameters.get(key)
        if parameter is None:
            return self.plain.get(key)
        return parameter.places[key](self.dense(parameter)).contiguous()

    def dense(self, parameter: QuantizedParameter) -> Tensor:
        """The dequantized values of a whole parameter, in the data type of the files."""
        if id(parameter) in self._stacks:
            return self._stacks[id(parameter)]
        plain, made = self._quantize(parameter)
        found = made.dequantize(dtype=plain.dtype)
        self._lost[id(parameter)] = made.squared_error(plain)
        found = found.T if parameter.turned else found.view(parameter.shape)
        if len(parameter.places) > 1:
            self._stacks = dict([*self._stacks.items(), (id(parameter), found)][-_STACKS:])
        return found

    def dtypes(self) -> set[str]:
        return self.plain.dtypes()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for key in self.files:
            yield key, self.get(key)

    def _quantize(self, parameter: QuantizedParameter) -> tuple[Tensor, QuantizedWeight]:
        """(the plain weight [out, in], the quantized one)."""
        read = {key: self.plain.get(key) for key in parameter.places}
        plain = torch.empty(parameter.shape, dtype=next(iter(read.values())).dtype)
        for key, value in read.items():
            parameter.places[key](plain).copy_(value)
        plain = plain.T.contiguous() if parameter.turned else plain.reshape(-1, parameter.shape[-1])
        return plain, quantize(plain, self.scheme.format, double=self.scheme.double)
