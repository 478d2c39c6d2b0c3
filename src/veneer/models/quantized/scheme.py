"""The way in which a checkpoint is quantized, from its config.json: read, dequantized while it is read, or refused with the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.errors import BaseModelError
from veneer.kernels.quantized.state import FORMATS

__all__ = ["CALIBRATION", "FP8", "METHOD", "Scheme", "calibration_of", "read_scheme", "scheme_for"]

METHOD = "veneer"
"""``quant_method`` of folders whose experts are quantized too. Other programs do not know it, and refuse the folder."""
CALIBRATION = "calibration"
"""Key in ``quantization_config`` of the record of calibration examples; other programs pass it over."""
_UNKNOWN = (
    "Veneer reads weights that bitsandbytes quantized (nf4, fp4, int8), and quantizes plain ones itself with --quantize"
)


@dataclass(frozen=True)
class FP8:
    """Fine-grained FP8 weights. block: rows and columns that share a scale; None for one scale for each weight."""

    block: tuple[int, int] | None


@dataclass(frozen=True)
class Scheme:
    """Quantization of the linear layers of a base.

    Attributes:
        format: nf4, fp4 or int8.
        double: double quantization.
        stored: whether the files are quantized; otherwise they are quantized while they are read.
        skip: names of modules that are not quantized; None for transformers' choice (the output head).
        fp8: how the files hold weights that are dequantized first; None for plain weights.
        stacks: parameters of stacked experts that the files hold quantized, with the number of experts. Only Veneer reads such files.
    """

    format: str
    double: bool = True
    stored: bool = False
    skip: tuple[str, ...] | None = None
    fp8: FP8 | None = None
    stacks: Mapping[str, int] = field(default_factory=dict)

    def as_config(self, dtype: torch.dtype) -> dict[str, Any]:
        """The ``quantization_config`` with which transformers and bitsandbytes read such weights; ``dtype``: what they compute in."""
        eight = self.format == "int8"
        skip = None if self.skip is None else list(self.skip)
        four = {
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "fp4" if eight else self.format,
            "bnb_4bit_use_double_quant": self.double and not eight,
        }
        if self.stacks:  # nothing by which transformers would take it for bitsandbytes'
            own = {"quant_method": METHOD, "format": self.format, "double": self.double, "skip": skip}
            return {**own, "stacks": dict(self.stacks)}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": not eight,
            "load_in_8bit": eight,
            "llm_int8_skip_modules": skip,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            **four,
        }


def scheme_for(format: str) -> Scheme:
    """The scheme in which a plain checkpoint is quantized to a format.

    Raises BaseModelError for a format that is not known.
    """
    if format not in FORMATS:
        raise BaseModelError(f"quantize: {format!r} is not one of {', '.join(FORMATS)}")
    return Scheme(format)


def read_scheme(config: Mapping[str, Any], folder: Path) -> Scheme | FP8 | None:
    """The scheme of the weights in a folder; FP8 where they are dequantized while they are read, None where they are plain.

    Raises BaseModelError, with the way to a base that can be trained on, for weights that cannot be read.
    """
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise BaseModelError(f"{folder / 'config.json'}: quantization_config is not a JSON object; get the file again")
    method = str(found.get("quant_method", "bitsandbytes"))
    if method == "fp8":
        block = found.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        ):
            raise BaseModelError(f"{folder / 'config.json'}: weight_block_size is {block!r}; expected two sizes")
        return FP8(None if block is None else (block[0], block[1]))
    if method not in ("bitsandbytes", METHOD):
        raise BaseModelError(_refusal(method, folder))
    if method == METHOD:
        return _own(found, folder)
    skip = found.get("llm_int8_skip_modules")
    names = None if skip is None else tuple(map(str, skip))
    if found.get("load_in_8bit") or found.get("_load_in_8bit"):
        return Scheme("int8", double=False, stored=True, skip=names)
    format = str(found.get("bnb_4bit_quant_type", "fp4"))
    if format not in FORMATS:
        raise BaseModelError(f"{folder / 'config.json'}: bnb_4bit_quant_type is {format!r}; expected nf4 or fp4")
    return Scheme(format, double=bool(found.get("bnb_4bit_use_double_quant")), stored=True, skip=names)


def calibration_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the examples that a folder's weights were calibrated on, from its config.json; None if there is none."""
    found = config.get("quantization_config")
    record = found.get(CALIBRATION) if isinstance(found, Mapping) else None
    return dict(record) if isinstance(record, Mapping) else None


def _own(found: Mapping[str, Any], folder: Path) -> Scheme:
    """The scheme of a folder whose experts are quantized too."""
    format, skip, stacks = (found.get(key) for key in ("format", "skip", "stacks"))
    known = isinstance(stacks, Mapping) and all(type(count) is int and count > 0 for count in stacks.values())
    if format not in FORMATS or not known:
        raise BaseModelError(
            f"{folder / 'config.json'}: quantization_config: expected a format of {', '.join(FORMATS)} and the number of experts of each "
            f"stack, found {format!r} and {stacks!r}; get the file again"
        )
    names = None if skip is None else tuple(map(str, skip))
    return Scheme(str(format), double=bool(found.get("double")), stored=True, skip=names, stacks=dict(stacks or {}))


def _refusal(method: str, folder: Path) -> str:
    where = f"the weights in {folder} are quantized with {method}"
    remedy = "use the model that it was made from, with --quantize nf4 if memory is short"
    if method in ("gptq", "awq", "auto-round", "hqq", "aqlm", "vptq", "higgs", "spqr", "quip", "eetq", "quanto"):
        return f"{where}, whose layers need kernels of their own to train on; {remedy}"
    if method in ("mxfp4", "nvfp4", "fbgemm_fp8", "fp_quant"):
        return (
            f"{where}, which has no gradient; use a bfloat16 copy of the model, with --quantize nf4 if memory is short"
        )
    if method == "gguf":
        return f"{where}; give the .gguf file itself, which is dequantized once, with --quantize nf4 if memory is short"
    return f"{where}, which is not supported ({_UNKNOWN}); {remedy}"
