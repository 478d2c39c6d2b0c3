"""A base's GGUF file with other weights in some of its tensors, for llama.cpp and programs built on it.

All fields of the file (tokenizer, template, sizes) are copied. Matrices are written in one format, vectors in fp32. ``q8_0`` is computed
here, ``q4_k_m`` by llama.cpp's own ``llama-quantize``, from an fp16 file.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer._files import replacing
from veneer.errors import ExportError

QUANTIZED = ("q8_0", "q4_k_m")
_FORMATS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_COMPUTED = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type")
"""Fields that the writer makes itself."""
_SECONDS = 3600.0


def write_gguf_model(
    source: Path, path: Path, changed: Mapping[str, Callable[[], Tensor]], *, form: str
) -> tuple[int, float]:
    """Write a copy of a GGUF file with other weights.

    Args:
        source: the base's file.
        path: the new file.
        changed: for each tensor that changes, by its name in the file, a function that returns its weights [out, in].
        form: "f32", "f16", "bf16", "q8_0" or "q4_k_m".

    Returns:
        The size in bytes, and the relative error of the changed weights as they were written (before ``q4_k_m``, where it is not known).

    Raises:
        ExportError: the file has no such tensor, or ``llama-quantize`` is not installed or fails.
    """
    if form != "q4_k_m":
        with replacing(path) as beside:
            error = _write(source, beside, changed, form)
        return path.stat().st_size, error
    program = shutil.which("llama-quantize")
    if program is None:
        raise ExportError(
            "q4_k_m is made by llama.cpp's llama-quantize, which is not on the PATH; install llama.cpp, or choose --quantize q8_0"
        )
    with replacing(path) as beside:
        whole = beside.with_name(f"{beside.name}.f16")
        try:
            error = _write(source, whole, changed, "f16")
            command = [program, str(whole), str(beside), "Q4_K_M"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        finally:
            whole.unlink(missing_ok=True)
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise ExportError(f"llama-quantize failed with status {done.returncode}: {last[0]}")
    return path.stat().st_size, error


def _write(source: Path, path: Path, changed: Mapping[str, Callable[[], Tensor]], form: str) -> float:
    import gguf

    reader = gguf.GGUFReader(source)
    missing = sorted(set(changed) - {tensor.name for tensor in reader.tensors})
    if missing:
        raise ExportError(f"{source} has no tensor {missing[0]}, which the adapter changes; check --base")
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    _copy_fields(reader, writer)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[form]))
    distance = size = 0.0
    for tensor in reader.tensors:
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        exact = changed[tensor.name]().float().contiguous().numpy() if tensor.name in changed else stored
        if exact.shape != stored.shape:
            raise ExportError(f"{tensor.name}: expected the shape {stored.shape}, found {exact.shape}; check --base")
        kind = _kind(exact.shape, form)
        data = gguf.quants.quantize(exact, kind)
        if tensor.name in changed:
            written = torch.from_numpy(gguf.quants.dequantize(data, kind)).double()
            value = torch.from_numpy(exact).double()
            if not bool(torch.isfinite(written).all()):
                raise ExportError(f"{tensor.name} does not fit the range of {form}; choose another format")
            distance += float((written - value).square().sum())
            size += float(value.square().sum())
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (distance / size) ** 0.5 if size else 0.0


def _copy_fields(reader: Any, writer: Any) -> None:
    import gguf

    for field in reader.fields.values():
        if field.name in _COMPUTED:
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)


def _kind(shape: tuple[int, ...], form: str) -> Any:
    """The format of a tensor: vectors stay exact, and rows that blocks do not divide are fp16."""
    import gguf

    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    kind = getattr(gguf.GGMLQuantizationType, _FORMATS[form])
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16
