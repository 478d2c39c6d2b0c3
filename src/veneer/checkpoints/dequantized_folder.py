"""A folder of weights that bitsandbytes quantized, seen as the plain model that they stand for.

Merging, composing and extracting read a base tensor by tensor; from this folder they get dequantized weights, one at a time, and no scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.checkpoints.model_folder import ModelFolder
from veneer.errors import CheckpointError
from veneer.kernels.quantized.state import COMPANIONS, shape_of, weight_of
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.models.quantized.scheme import Scheme, read_scheme

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class DequantizedFolder(ModelFolder):
    """A model folder whose quantized weights are dequantized when they are asked for, in the model's data type."""

    scheme: Scheme | None = None
    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Weight -> {name behind the layer's: key in the files} of quantized weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = read_scheme(self.config, self.path)
        self.scheme = found if isinstance(found, Scheme) else None
        for key in list(self.files):
            layer = next((key.removesuffix(f".{name}") for name in COMPANIONS if key.endswith(f".{name}")), None)
            if layer is not None and f"{layer}.weight" in self.files:
                parts = self.parts.setdefault(f"{layer}.weight", {"weight": f"{layer}.weight"})
                parts[key.removeprefix(f"{layer}.")] = key
        self.hidden = {key for parts in self.parts.values() for name, key in parts.items() if name != "weight"}
        self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        self._quantized_keys = dict(self.files)
        self.files = {key: file for key, file in self.files.items() if key not in self.hidden}

    def quantized(self, key: str) -> QuantizedWeight | None:
        """A quantized weight as stored."""
        if key not in self.parts:
            return None
        tensors = {name: self._stored(part) for name, part in self.parts[key].items()}
        try:
            return weight_of(tensors, shape_of(tensors))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {key}: {error}; get the file again") from error

    def format(self, key: str) -> str | None:
        return self.scheme.format if self.scheme is not None and key in self.parts else None

    def get(self, key: str) -> Tensor:
        weight = self.quantized(key)
        return super().get(key) if weight is None else weight.dequantize(dtype=self._dtype())

    def shape(self, key: str) -> tuple[int, ...]:
        weight = self.quantized(key)
        return super().shape(key) if weight is None else tuple(weight.shape)

    def dtypes(self) -> set[str]:
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        return {names[self._dtype()]}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for key in self.files:
            yield key, self.get(key)

    def bytes(self) -> int:
        return 4 * super().bytes()

    def _stored(self, key: str) -> Tensor:
        files, self.files = self.files, self._quantized_keys
        try:
            return super().get(key)
        finally:
            self.files = files

    def _dtype(self) -> torch.dtype:
        named: Any = self.config.get("dtype") or self.config.get("torch_dtype")
        return _DTYPES.get(str(named), torch.float32)
