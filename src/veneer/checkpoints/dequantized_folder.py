"""Folders of weights that bitsandbytes quantized, or that are FP8, seen as the plain models that they stand for.

Merging, composing and extracting read a base tensor by tensor; from these folders they get dequantized weights, one at a time, and no
scales. A plain folder can be seen as the base that ``--quantize`` makes of it: an adapter that was trained with it was fitted to these
weights. It can also be seen as the folder of the same model with a head: transformers reads a body that was saved alone under names
without a prefix; written beside a head they need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.checkpoints.model_folder import ModelFolder, read_tensor, stored_shape
from veneer.errors import CheckpointError
from veneer.kernels.quantized.fp8 import SCALE, dequantize_fp8
from veneer.kernels.quantized.state import COMPANIONS, quantize, shape_of, weight_of
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.models.classifiers.heads import drawn_head
from veneer.models.quantized.scheme import FP8, Scheme, read_scheme

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STACKS = 3
"""Stacks of experts kept dequantized, since files that hold experts one by one are read expert by expert."""
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}


class PlainView(ModelFolder):
    """A model folder whose tensors are made when they are asked for, in the model's data type."""

    def dtypes(self) -> set[str]:
        return {_NAMES[dtype_of(self.config)]}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for key in self.files:
            yield key, self.get(key)


@dataclass
class DequantizedFolder(PlainView):
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
        self.config = _plain(self.config)
        self._all = dict(self.files)
        self.stacks = dict(self.scheme.stacks) if self.scheme is not None else {}
        plain = {f"{name}.weight": name for name in self.stacks}
        self.parts = {plain.get(key, key): parts for key, parts in self.parts.items()}
        self.files = {plain.get(key, key): file for key, file in self.files.items() if key not in self.hidden}

    def quantized(self, key: str) -> QuantizedWeight | None:
        """A quantized weight as stored."""
        if key not in self.parts:
            return None
        tensors = {name: read_tensor(self._all[part], part) for name, part in self.parts[key].items()}
        try:
            return weight_of(tensors, shape_of(tensors))
        except ValueError as error:
            raise self._damaged(key, error) from error

    def _damaged(self, key: str, error: ValueError) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key}: {error}; get the file again")

    def format(self, key: str) -> str | None:
        return self.scheme.format if self.scheme is not None and key in self.parts else None

    def get(self, key: str) -> Tensor:
        weight = self.quantized(key)
        if weight is None:
            return super().get(key)
        dense = weight.dequantize(dtype=dtype_of(self.config))
        return dense.unflatten(0, (self.stacks[key], -1)) if key in self.stacks else dense

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self.parts:
            return super().shape(key)
        parts = self.parts[key]
        try:
            if "SCB" in parts:  # int8, which has the shape of the weight
                shape = stored_shape(self._all[parts["weight"]], parts["weight"])
            else:
                beside = {name: part for name, part in parts.items() if name != "weight"}
                shape = tuple(shape_of({name: read_tensor(self._all[part], part) for name, part in beside.items()}))
        except ValueError as error:
            raise self._damaged(key, error) from error
        return (self.stacks[key], shape[0] // self.stacks[key], *shape[1:]) if key in self.stacks else shape

    def bytes(self) -> int:
        return 4 * super().bytes()


@dataclass
class FP8Folder(PlainView):
    """A model folder whose FP8 weights are dequantized when they are asked for, in the model's data type."""

    scheme: FP8 = field(default_factory=lambda: FP8(None))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config = _plain(self.config)
        self._scales = {key.removesuffix("_scale_inv"): key for key in self.files if key.endswith(f".{SCALE}")}
        self._all = dict(self.files)
        hidden = {*self._scales.values(), *(key for key in self.files if key.endswith(".activation_scale"))}
        self.files = {key: file for key, file in self.files.items() if key not in hidden}

    def get(self, key: str) -> Tensor:
        weight = super().get(key)
        if key not in self._scales:
            return weight
        scale = self._scales[key]
        try:
            return dequantize_fp8(
                weight, read_tensor(self._all[scale], scale), self.scheme.block, dtype_of(self.config)
            )
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {key}: {error}; get the file again") from error

    def bytes(self) -> int:
        return 2 * super().bytes()


@dataclass(frozen=True, eq=False)
class QuantizedParameter:
    """A parameter that is quantized as a whole.

    Attributes:
        name: in the model.
        shape: in the model.
        transposed: it is stored [in, out], and quantized as [out, in].
        places: tensor in the files -> a function from the parameter to the view of it that the tensor fills.
    """

    name: str
    shape: torch.Size
    transposed: bool
    places: Mapping[str, Callable[[Tensor], Tensor]]


class QuantizedReading(PlainView):
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
        return None if parameter is None or len(parameter.places) > 1 else self.both(parameter)[1]

    def format(self, key: str) -> str | None:
        return self.scheme.format if key in self.parameters else None

    def shape(self, key: str) -> tuple[int, ...]:
        return self.plain.shape(key)

    def get(self, key: str) -> Tensor:
        parameter = self.parameters.get(key)
        if parameter is None:
            return self.plain.get(key)
        return parameter.places[key](self.dense(parameter)).contiguous()

    def dense(self, parameter: QuantizedParameter) -> Tensor:
        """The dequantized values of a whole parameter, in the data type of the files."""
        if id(parameter) in self._stacks:
            return self._stacks[id(parameter)]
        plain, made = self.both(parameter)
        found = made.dequantize(dtype=plain.dtype)
        self._lost[id(parameter)] = made.squared_error(plain)
        found = found.T if parameter.transposed else found.view(parameter.shape)
        if len(parameter.places) > 1:
            self._stacks = dict([*self._stacks.items(), (id(parameter), found)][-_STACKS:])
        return found

    def dtypes(self) -> set[str]:
        return self.plain.dtypes()

    def both(self, parameter: QuantizedParameter) -> tuple[Tensor, QuantizedWeight]:
        """(the plain weight [out, in], the quantized one)."""
        read = {key: self.plain.get(key) for key in parameter.places}
        plain = torch.empty(parameter.shape, dtype=next(iter(read.values())).dtype)
        for key, value in read.items():
            parameter.places[key](plain).copy_(value)
        plain = plain.T.contiguous() if parameter.transposed else plain.reshape(-1, parameter.shape[-1])
        return plain, quantize(plain, self.scheme.format, double=self.scheme.double)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """The data type that a model's config names, else float32."""
    named: Any = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(str(named), torch.float32)


@dataclass
class FolderWithHead(PlainView):
    """A model folder with a head, which has the values that loading such a model draws.

    Attributes:
        renamed: tensor name in the files -> its name in the model.
        absent: shapes of the parameters of the head that the files do not have.
        dropped: tensors of the files that the model has no use for: another head.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    absent: Mapping[str, Sequence[int]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        given = dict(self.config)
        super().__post_init__()
        self.config = given
        self._stored = {self.renamed.get(key, key): key for key in self.files if key not in self.dropped}
        self._dtype = _BY_NAME.get(min(self.dtypes()), torch.float32)
        self._head = drawn_head({name: shape for name, shape in self.absent.items() if len(shape) > 1})
        last = next(reversed(self.files.values()))
        self.files = {name: self.files[key] for name, key in self._stored.items()} | dict.fromkeys(self.absent, last)

    def get(self, key: str) -> Tensor:
        if key in self._stored:
            return read_tensor(self.files[key], self._stored[key])
        return self._head.get(key, torch.zeros(tuple(self.absent[key]))).to(self._dtype)

    def shape(self, key: str) -> tuple[int, ...]:
        stored = self._stored.get(key)
        return tuple(self.absent[key]) if stored is None else stored_shape(self.files[key], stored)

    def dtypes(self) -> set[str]:
        return ModelFolder.dtypes(self)
