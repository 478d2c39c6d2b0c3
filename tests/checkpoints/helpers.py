"""Folders for the tests: made by PEFT on fresh tiny models, or written byte by byte."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tests.tiny import tiny
from torch import Tensor, nn

from veneer.checkpoints.commit import candidates, verified

TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "k_proj", "o_proj", "gate_proj"],
    "gemma3": ["q_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "v_proj", "fc1", "out_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "bert": ["query", "value", "dense"],
    "vit": ["q_proj", "v_proj", "fc1"],
}


def newest(parent: Path) -> Path | None:
    """The newest checkpoint that agrees with its manifest, or None."""
    return next((folder for folder in candidates(parent) if verified(folder)), None)


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two rows of seven tokens, or two small images."""
    if getattr(model, "main_input_name", "") == "pixel_values":
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        return {"pixel_values": pixels}
    ids = torch.arange(5, 19).reshape(2, 7)
    return {"input_ids": ids}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """Logits on `inputs`."""
    logits: Tensor = model.eval()(**inputs(model)).logits
    return logits


def stir(model: nn.Module, *words: str, by: float = 0.1) -> None:
    """Move every parameter whose name holds one of the words, as training would."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if any(word in name for word in words):
            parameter.data.add_(by * torch.randn(parameter.shape, generator=generator))


def peft_model(base: nn.Module, **settings: Any) -> Any:
    """PEFT's model over ``base`` with an adapter that looks trained."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    stir(model, "lora_", "modules_to_save", "trainable_tokens_delta")
    if settings.get("bias", "none") != "none":
        stir(model, ".base_layer.bias" if settings["bias"] == "lora_only" else ".bias")
    return model.eval()


def save_peft(model: Any, folder: Path) -> Path:
    """PEFT's own folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def load_peft(base: nn.Module, folder: Path) -> Any:
    """A folder loaded by PEFT onto ``base``. A tensor that it does not find, or has no place for, is an error here."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(base, folder).eval()


def peft_folder(
    folder: Path, arch: str = "llama", *, tiny_options: Mapping[str, Any] | None = None, **settings: Any
) -> Path:
    """A folder that PEFT wrote for a tiny model."""
    model = peft_model(tiny(arch, **(tiny_options or {})), **{"target_modules": TARGETS[arch], **settings})
    return save_peft(model, folder)


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file, unchecked."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def file_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor_bytes(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], dtypes: Mapping[str, str] | None = None
) -> bytes:
    """A legal file of these tensors, whatever their dtypes."""
    names = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.float64: "F64",
        torch.int8: "I8",
    }
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in dict(tensors).items():
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        dtype = (dtypes or {}).get(name) or names[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return file_bytes(header, data)


def config(**settings: Any) -> dict[str, Any]:
    """Settings of a folder, q_proj of the tiny Llama at rank 4 unless said otherwise."""
    plain = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "init_lora_weights": True,
        "bias": "none",
    }
    return {**plain, **settings}


def q_tensors(r: int = 4, layers: int = 2, **extra: Tensor) -> dict[str, Tensor]:
    """Factors for q_proj of the tiny Llama, by PEFT's names."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{path}.lora_A.weight"] = 0.1 * torch.randn(r, 32, generator=generator)
        tensors[f"{path}.lora_B.weight"] = 0.1 * torch.randn(32, r, generator=generator)
    return {**tensors, **extra}


def make_folder(
    folder: Path, tensors: Mapping[str, Tensor] | bytes | None = None, settings: Mapping[str, Any] | bytes | None = None
) -> Path:
    """A folder of these tensors (or raw bytes) and settings; the tiny Llama's q_proj by default."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors if isinstance(tensors, bytes) else tensor_bytes(q_tensors() if tensors is None else tensors)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    text = settings if isinstance(settings, bytes) else json.dumps(config() if settings is None else settings).encode()
    (folder / "adapter_config.json").write_bytes(text)
    return folder
