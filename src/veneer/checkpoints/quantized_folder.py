"""Writing a base with quantized weights, in the layout that transformers reads with bitsandbytes.

The base is read, quantized and written tensor by tensor; the model is built without weights, to know which layers are linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.checkpoints.base_files import Skeleton, check_float, quantized_parameters
from veneer.checkpoints.dequantized_folder import QuantizedParameter, QuantizedReading
from veneer.checkpoints.model_folder import SHARD_BYTES, ModelWriter, write_model
from veneer.errors import CheckpointError
from veneer.kernels.quantized.state import quantize, state_of
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.models.quantized.loading import quantized_names
from veneer.models.quantized.scheme import Scheme


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

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The layers with the largest error first."""
        return sorted(self.layers.items(), key=lambda item: -item[1])[:count]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def quantize_to_folder(
    base: Skeleton,
    out: Path,
    scheme: Scheme,
    *,
    shard_bytes: int = SHARD_BYTES,
    experts: bool = False,
    check: Callable[[Path], None] | None = None,
) -> QuantizeReport:
    """Quantize the linear layers of a base, and write the model to ``out``.

    Args:
        base: the base's files.
        out: the new folder.
        scheme: the format.
        shard_bytes: the largest size of one file.
        experts: quantize stacked experts too, each fused parameter as one; other programs do not read the folder then.
        check: is called with the finished folder before it gets its name.

    Raises:
        CheckpointError: there is no linear layer whose weight is in the files under its own name.
    """
    keys = quantizable(base, scheme)
    if not keys:
        raise CheckpointError(
            f"{base.folder.path} has no linear layer that can be quantized; give a base that has some"
        )
    stacks = _stacks(base, scheme)
    named = {held.name: int(held.shape[0]) for held in stacks.values()} if experts else {}
    report = QuantizeReport(str(out), scheme.format, scheme.double)
    report.stacks = len(named)
    report.plain = sorted(set(quantized_names(base.model, scheme.skip, turned=False)) - set(keys.values()))
    config = {**base.folder.config, "quantization_config": replace(scheme, stacks=named).as_config(compute_dtype(base))}
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
                put(key, keys[key], tensor, quantize(tensor, scheme.format, double=scheme.double))
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
    names = quantized_names(base.model, scheme.skip, turned=False)
    return {base.names[f"{name}.weight"]: name for name in names if f"{name}.weight" in base.names}


def put_quantized(writer: ModelWriter, key: str, weight: QuantizedWeight) -> None:
    """Write the tensors of a quantized weight; ``key``: the name of the plain one."""
    layer = key.removesuffix("weight")
    for name, value in state_of(weight).items():
        writer.put(f"{layer}{name}", value)


def compute_dtype(base: Skeleton) -> torch.dtype:
    """The data type that the base's config names, else float32."""
    names = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return names.get(str(base.folder.config.get("dtype") or base.folder.config.get("torch_dtype")), torch.float32)
