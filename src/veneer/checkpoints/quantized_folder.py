"""Writing a base with quantized weights, in the layout that transformers reads with bitsandbytes.

The base is read, quantized and written tensor by tensor; the model is built without weights, to know which layers are linear. With
calibration texts, a model in memory is quantized block by block first, and its weights are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.checkpoints.base_files import Skeleton, check_float, quantized_parameters
from veneer.checkpoints.dequantized_folder import QuantizedParameter, QuantizedReading, dtype_of
from veneer.checkpoints.model_folder import SHARD_BYTES, ModelWriter, write_model
from veneer.data.batch import make_batch, packed
from veneer.data.example import Example
from veneer.data.hashing import data_hash
from veneer.errors import BaseModelError, CheckpointError, DataError
from veneer.kernels.quantized.bitsandbytes import quantized_layer, quantized_weight
from veneer.kernels.quantized.state import quantize, state_of, with_dtype
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.models.flat import FlatRunner
from veneer.models.load import Base
from veneer.models.quantized.calibration import quantize_in_place
from veneer.models.quantized.loading import quantized_names
from veneer.models.quantized.scheme import CALIBRATION, Scheme

CALIBRATION_TOKENS = 8192
"""Tokens of examples that layers are calibrated on."""
_LEAST_TOKENS = 128
_TOKENS_PER_PASS = 1024


@dataclass(frozen=True)
class Calibrated:
    """A model whose linear layers were quantized with regard to their inputs, and the record of the examples."""

    model: Any
    record: dict[str, Any]

    def weight(self, layer: str, dtype: torch.dtype) -> QuantizedWeight:
        """The weight of a layer, with values of the data type of the files."""
        made = quantized_weight(self.model.get_submodule(layer))
        here = made.with_tensors(made.stored.cpu(), {name: scale.cpu() for name, scale in made.scales.items()})
        return with_dtype(here, dtype)


def draw(examples: Sequence[Example], tokens: int = CALIBRATION_TOKENS) -> list[Example]:
    """Examples with about so many tokens, always the same; all of them if they have fewer."""
    drawn: list[Example] = []
    for index in torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist():
        if sum(map(len, drawn)) >= tokens:
            break
        drawn.append(examples[index])
    return drawn


def calibrate(
    base: Base, examples: Sequence[Example], scheme: Scheme, progress: Callable[[int, int], None] | None = None
) -> Calibrated:
    """Quantize the linear layers of a base in memory with regard to their inputs on these examples.

    Args:
        base: with plain weights; its model is changed.
        examples: a few thousand tokens of what the base will be used for.
        scheme: the format.
        progress: is called with the number of blocks that are done and the number of all.

    Raises:
        BaseModelError: the weights are quantized already, or the model has no list of blocks.
        DataError: the examples have too few tokens.
    """
    if any(quantized_layer(module) for module in base.model.modules()):
        raise BaseModelError(
            f"the weights of {base.name} are quantized already, and calibration chooses the values of plain ones; use the model that they "
            "were made from"
        )
    count = sum(map(len, examples))
    if count < _LEAST_TOKENS:
        raise DataError(
            f"the calibration examples have {count} tokens; expected at least {_LEAST_TOKENS}; give more or longer rows"
        )
    batches = [make_batch(part, "calibration") for part in packed(examples, _TOKENS_PER_PASS)]
    quantize_in_place(FlatRunner(base.model), batches, scheme, progress)
    record = {"base": base.name, "examples": len(examples), "tokens": count, "sha256": data_hash(examples)}
    return Calibrated(base.model, record)


@dataclass
class QuantizeReport:
    """The result: sizes of the weights in bytes, and the error of each quantized weight as a share of its norm.

    error: over all quantized weights. plain: names of linear layers that were left as they are.
    """

    out: str
    format: str
    double: bool
    before: int = 0
    after: int = 0
    error: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    stacks: int = 0
    """Number of fused parameters of experts among ``layers``."""
    experts: int = 0
    """Bytes of stacked experts that were left as they are."""
    calibration: dict[str, Any] | None = None
    """The examples that the layers were calibrated on: their number, their tokens and their hash."""


def quantize_to_folder(
    base: Skeleton,
    out: Path,
    scheme: Scheme,
    *,
    shard_bytes: int = SHARD_BYTES,
    experts: bool = False,
    calibrated: Calibrated | None = None,
    check: Callable[[Path], None] | None = None,
) -> QuantizeReport:
    """Quantize the linear layers of a base, and write the model to ``out``.

    Args:
        base: the base's files.
        out: the new folder.
        scheme: the format.
        shard_bytes: the largest size of one file.
        experts: quantize stacked experts too, each fused parameter as one; other programs do not read the folder then.
        calibrated: has the quantized weights of the linear layers.
        check: is called with the finished folder before it gets its name.

    Raises:
        CheckpointError: there is no linear layer whose weight is in the files under its own name.
    """
    keys = check_quantizable(base, scheme)
    stacks = _stacks(base, scheme)
    named = {held.name: int(held.shape[0]) for held in stacks.values()} if experts else {}
    report = QuantizeReport(str(out), scheme.format, scheme.double)
    report.stacks = len(named)
    report.plain = sorted(set(quantized_names(base.model, scheme.skip, transposed=False)) - set(keys.values()))
    record = {} if calibrated is None else {CALIBRATION: calibrated.record}
    report.calibration = record.get(CALIBRATION)
    config = {
        **base.folder.config,
        "quantization_config": {**replace(scheme, stacks=named).as_config(dtype_of(base.folder.config)), **record},
    }
    reading = QuantizedReading(base.folder, scheme, stacks)
    totals = [0.0, 0.0]

    def put(key: str, layer: str, weight: Tensor, made: QuantizedWeight) -> None:
        lost, total = made.squared_error(weight)
        report.layers[layer] = math.sqrt(lost / total) if total else 0.0
        totals[:] = totals[0] + lost, totals[1] + total
        put_quantized(writer, key, made)

    with write_model(base.folder, out, config, shard_bytes=shard_bytes, check=check) as writer:
        for key, tensor in base.folder.tensors():
            size = tensor.numel() * tensor.element_size()
            report.before += size
            if key in keys:
                check_float(key, tensor)
                made = None if calibrated is None else calibrated.weight(keys[key], tensor.dtype)
                put(key, keys[key], tensor, made or quantize(tensor, scheme.format, double=scheme.double))
            elif key not in stacks or not experts:
                report.experts += size if key in stacks else 0
                writer.put(key, tensor)
            elif stacks[key].name not in report.layers:
                put(f"{stacks[key].name}.weight", stacks[key].name, *reading.both(stacks[key]))
        report.after = writer.total_bytes
    report.error = math.sqrt(totals[0] / totals[1]) if totals[1] else 0.0
    return report


def _stacks(base: Skeleton, scheme: Scheme) -> dict[str, QuantizedParameter]:
    """{name in the files: the fused parameter that it is part of} of stacked experts."""
    found = quantized_parameters(base, scheme)
    return {key: parameter for key, parameter in found.items() if len(parameter.shape) == 3}


def quantizable(base: Skeleton, scheme: Scheme) -> dict[str, str]:
    """{name in the files of a weight: its layer} of the linear layers that transformers reads quantized."""
    names = quantized_names(base.model, scheme.skip, transposed=False)
    return {base.names[f"{name}.weight"]: name for name in names if f"{name}.weight" in base.names}


def check_quantizable(base: Skeleton, scheme: Scheme) -> dict[str, str]:
    """`quantizable`. Raises CheckpointError for a base without such a layer."""
    keys = quantizable(base, scheme)
    if not keys:
        raise CheckpointError(
            f"{base.folder.path} has no linear layer that can be quantized; give a base that has some"
        )
    return keys


def put_quantized(writer: ModelWriter, key: str, weight: QuantizedWeight) -> None:
    """Write the tensors of a quantized weight; ``key``: the name of the plain one."""
    layer = key.removesuffix("weight")
    for name, value in state_of(weight).items():
        writer.put(f"{layer}{name}", value)
