"""Quantized weights as the tensors of a checkpoint of bitsandbytes: their names, their settings, and the checks of what is read.

    four bits    weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 (JSON in bytes: shape, dtype, blocksize, ...)
                 with double quantization weight.nested_absmax, weight.nested_quant_map
    int8         weight, SCB, weight_format

A file is refused where its numbers would mean something else than they do here: another map, another order, sizes that do not fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.quantized.four_bit import BLOCKS, FP4, NF4, OUTER, FourBit, absmax_map, code_of
from veneer.kernels.quantized.int8 import Int8
from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = ["COMPANIONS", "FORMATS", "is_companion", "quantize", "shape_of", "state_of", "weight_of", "with_dtype"]

FORMATS: dict[str, type[FourBit] | type[Int8]] = {"nf4": NF4, "fp4": FP4, "int8": Int8}
"""The formats by name."""
_SETTINGS = "weight.quant_state.bitsandbytes__"
_INT8 = ("SCB", "weight_format")
COMPANIONS = (
    *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4", *_INT8),
)
"""Names, behind a layer's, of the tensors that belong to a packed weight."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantize(weight_OK: Tensor, format: str, *, double: bool = True, block: int = 64) -> QuantizedWeight:
    """Quantize a weight to a format of `FORMATS`; ``double`` and ``block`` are for four bits."""
    made = FORMATS[format]
    if issubclass(made, FourBit):
        return made.quantize(weight_OK, double=double, block=block)
    return made.quantize(weight_OK)


def with_dtype(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    """The same numbers as of a weight of this data type, to which values are rounded; int8 has fp32 values always."""
    return replace(weight, dtype=dtype) if isinstance(weight, FourBit) else weight


def is_companion(name: str) -> bool:
    """True for the name, behind a layer's, of a tensor that belongs to a quantized weight."""
    return name in COMPANIONS


def state_of(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a weight by the names that follow the layer's in a file."""
    if isinstance(weight, Int8):
        return {"weight": weight.values, "SCB": weight.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    assert isinstance(weight, FourBit)
    device = weight.packed.device
    settings: dict[str, Any] = {
        "quant_type": weight.format,
        "blocksize": weight.block,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    # Copies of the maps: files do not hold tensors that share memory.
    found = {
        "weight": weight.packed,
        "weight.absmax": weight.absmax,
        "weight.quant_map": code_of(weight.format, device).clone(),
    }
    if weight.outer is not None:
        found |= {"weight.nested_absmax": weight.outer, "weight.nested_quant_map": absmax_map(device).clone()}
        settings |= {"nested_blocksize": OUTER, "nested_dtype": "float32", "nested_offset": weight.offset}
    return {
        **found,
        f"{_SETTINGS}{weight.format}": torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8),
    }


def weight_of(tensors: Mapping[str, Tensor], shape: Iterable[int]) -> QuantizedWeight:
    """The weight in a file's tensors, by the names that follow the layer's; ``shape`` is what the layer must have.

    Raises ValueError with everything that does not fit.
    """
    expected = torch.Size(shape)
    return _int8(tensors, expected) if "SCB" in tensors else _four_bit(tensors, expected)


def shape_of(tensors: Mapping[str, Tensor]) -> list[int]:
    """The shape that a file gives for a weight.

    Raises ValueError where it gives none.
    """
    if "SCB" in tensors:
        return list(tensors["weight"].shape)
    found = _settings(tensors).get("shape")
    if not isinstance(found, list) or not all(isinstance(size, int) for size in found):
        raise ValueError(f"it was made from a weight of shape {found!r}; expected two sizes")
    return found


def _int8(tensors: Mapping[str, Tensor], shape: torch.Size) -> Int8:
    values, scale = tensors["weight"], tensors["SCB"]
    problems = []
    if values.dtype != torch.int8 or values.shape != shape:
        problems.append(f"expected int8 of shape {list(shape)}, found {_said(values)}")
    if scale.dtype != torch.float32 or scale.shape != shape[:1]:
        problems.append(f"SCB: expected one float32 for each of {shape[0]} rows, found {_said(scale)}")
    if (order := tensors.get("weight_format")) is not None and order.numel() and int(order) != 0:
        problems.append(f"its numbers are packed in the order {int(order)} of a GPU's kernel; expected 0, row by row")
    _raise(problems)
    return Int8(values, scale)


def _four_bit(tensors: Mapping[str, Tensor], shape: torch.Size) -> FourBit:
    settings = _settings(tensors)
    made = FORMATS.get(settings.get("quant_type", ""))
    if made is None or not issubclass(made, FourBit):
        raise ValueError(f"its quant_type is {settings.get('quant_type')!r}; expected nf4 or fp4")
    block, dtype = settings.get("blocksize"), _DTYPES.get(str(settings.get("dtype")))
    problems = []
    if settings.get("shape") != list(shape):
        problems.append(f"it was made from a weight of shape {settings.get('shape')}; expected {list(shape)}")
    if dtype is None:
        problems.append(f"its dtype is {settings.get('dtype')!r}; expected float32, bfloat16 or float16")
    if block not in BLOCKS:
        raise ValueError(
            "; ".join([*problems, f"its blocksize is {block!r}; expected one of {', '.join(map(str, BLOCKS))}"])
        )
    packed, absmax = tensors["weight"], tensors["weight.absmax"]
    if packed.dtype != torch.uint8:  # the storage of FSDP: the same bytes
        packed = packed.contiguous().view(torch.uint8)
    packed = packed.reshape(-1, 1)
    numbers = shape.numel()
    if packed.numel() != (numbers + 1) // 2:
        problems.append(f"expected {(numbers + 1) // 2:,} bytes for {numbers:,} numbers, found {packed.numel():,}")
    blocks = -(-numbers // block)
    double = "weight.nested_absmax" in tensors
    kind = torch.uint8 if double else torch.float32
    if absmax.dtype != kind or absmax.shape != (blocks,):
        problems.append(f"absmax: expected {blocks:,} blocks of {block} in {_name(kind)}, found {_said(absmax)}")
    problems += _other_map("quant_map", tensors, code_of(made.format, packed.device))
    if not double:
        _raise(problems)
        assert dtype is not None
        return made(packed, absmax, shape, dtype, block)
    outer, offset = tensors["weight.nested_absmax"], settings.get("nested_offset")
    problems += _other_map("nested_quant_map", tensors, absmax_map(packed.device))
    if (
        settings.get("nested_blocksize") != OUTER
        or outer.shape != (-(-blocks // OUTER),)
        or outer.dtype != torch.float32
    ):
        problems.append(
            f"nested_absmax: expected {-(-blocks // OUTER)} blocks of {OUTER} in float32, found {_said(outer)}"
        )
    if not isinstance(offset, int | float):
        problems.append(f"its nested_offset is {offset!r}; expected a number")
    _raise(problems)
    assert dtype is not None and isinstance(offset, int | float)
    return made(packed, absmax, shape, dtype, block, outer, float(offset))


def _settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    names = [name for name in tensors if name.startswith(_SETTINGS)]
    missing = [name for name in ("weight.absmax", "weight.quant_map") if name not in tensors]
    if len(names) != 1 or missing:
        raise ValueError(f"{', '.join(missing or ['its quant_state'])} is missing beside the packed weight")
    try:
        found = json.loads(bytes(tensors[names[0]].tolist()))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("its quant_state is not a JSON object")
    return found


def _other_map(name: str, tensors: Mapping[str, Tensor], expected: Tensor) -> list[str]:
    found = tensors.get(f"weight.{name}")
    if found is None or found.shape != expected.shape or not torch.equal(found.to(expected), expected):
        return [f"{name}: its values are not those of the format, so its numbers would be others"]
    return []


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


def _said(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} of shape {list(tensor.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
