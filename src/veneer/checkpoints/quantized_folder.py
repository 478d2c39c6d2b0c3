"""Writing a base with quantized weights, in the layout that transformers reads with bitsandbytes.

The base is read, quantized and written tensor by tensor; the model is built without weights, to know which layers are linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.checkpoints.base_files import Skeleton, check_float
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
    check: Callable[[Path], None] | None = None,
) -> QuantizeReport:
    """Quantize the linear layers of a base, and write the model to ``out``.

    Args:
        base: the base's files.
        out: the new folder.
        scheme: the format.
        shard_bytes: the largest size of one file.
        check: is called with the finished folder before it gets its name.

    Raises:
        CheckpointError: there is no linear layer whose weight is in the files under its own name.
    """
    keys = quantizable(base, scheme)
    if not keys:
        raise CheckpointError(
            f"{base.folder.path} has no linear layer that can be quantized; give a base that has some"
        )
    report = QuantizeReport(str(out), scheme.format, scheme.double)
    report.plain = sorted(set(quantized_names(base.model, scheme.skip, turned=False)) - set(keys.values()))
    config = {**base.folder.config, "quantization_config": scheme.as_config(compute_dtype(base))}
    lost = total = 0.0
    with write_model(base.folder, out, config, shard_bytes=shard_bytes, check=check) as writer:
        for key, tensor in base.folder.tensors():
            report.before += tensor.numel() * tensor.element_size()
            if key not in keys:
                writer.put(key, tensor)
                continue
            check_float(key, tensor)
            made = quantize(tensor, scheme.format, double=scheme.double)
            parts = made.squared_error(tensor)
            report.layers[keys[key]] = math.sqrt(parts[0] / parts[1]) if parts[1] else 0.0
            lost, total = lost + parts[0], total + parts[1]
            put_quantized(writer, key, made)
        report.after = writer.total_bytes
    report.error = math.sqrt(lost / total) if total else 0.0
    return report


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
