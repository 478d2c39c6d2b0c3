"""Quantized bases: read from checkpoints of bitsandbytes, quantized while they are read, refused where they cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny, tiny_tokenizer

from veneer.checkpoints.base_files import skeleton
from veneer.errors import BaseModelError
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.models.fingerprint import weight_fingerprints
from veneer.models.load import load_base
from veneer.models.quantized.size import parameter_count

IDS = torch.tensor([[5, 80, 33, 120, 7], [9, 8, 7, 6, 5]])
SIZES = {"hidden_size": 64, "intermediate_size": 128}
"""Widths that a block divides: one of bitsandbytes' CPU kernels is wrong for others."""
FORMATS = {"nf4": ("nf4", True), "nf4-single": ("nf4", False), "fp4": ("fp4", True), "int8": ("int8", False)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, saved as a folder."""
    folder = tmp_path_factory.mktemp("plain")
    tiny("llama", **SIZES).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def by_bitsandbytes(plain: Path, out: Path, format: str, double: bool) -> Any:
    """The model that transformers and bitsandbytes quantize and save; in training mode, where nothing is packed anew."""
    pytest.importorskip("bitsandbytes")
    import transformers

    four = {"bnb_4bit_quant_type": format, "bnb_4bit_use_double_quant": double} if format != "int8" else {}
    config = transformers.BitsAndBytesConfig(load_in_4bit=format != "int8", load_in_8bit=format == "int8", **four)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(out)
    return model.train()


def dense_of(model: Any) -> Any:
    """A plain model with the dequantized weights."""
    dense = tiny("llama", **SIZES)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.data.copy_(module.quantized.dequantize())
    return dense


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_of_bitsandbytes_are_read(name: str, plain: Path, tmp_path: Path) -> None:
    """Logits are those of the dense model with the dequantized weights and of bitsandbytes; it is not needed to read them."""
    format, double = FORMATS[name]
    theirs = by_bitsandbytes(plain, tmp_path / "theirs", format, double)
    ours = load_base(tmp_path / "theirs", dtype="float32")
    layers = [module for module in ours.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14 and {layer.quantized.format for layer in layers} == {format}
    assert torch.equal(logits(ours.model), logits(dense_of(ours.model)))
    assert (logits(ours.model) - logits(theirs)).abs().max() < 1e-5
    assert parameter_count(ours.model) == sum(p.numel() for p in tiny("llama", **SIZES).parameters())


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_plain_checkpoints_are_quantized_while_they_are_read(format: str, plain: Path, tmp_path: Path) -> None:
    """The same numbers as bitsandbytes makes; saved, transformers and bitsandbytes read them back."""
    ours = load_base(plain, dtype="float32", quantize=format)
    by_bitsandbytes(plain, tmp_path / "theirs", format, format != "int8")
    theirs = load_base(tmp_path / "theirs", dtype="float32")
    assert torch.equal(logits(ours.model), logits(theirs.model))
    ours.model.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    blobs = [name for name in files[0] if "quant_state" in name]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0].keys() - blobs)
    for name in blobs:
        assert json.loads(bytes(files[0][name].tolist())) == json.loads(bytes(files[1][name].tolist()))
    import transformers

    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).train()
    assert (logits(again) - logits(ours.model)).abs().max() < 1e-5


def test_conv1d_is_quantized_while_it_is_read(tmp_path: Path) -> None:
    """GPT-2's layers, stored [in, out], are quantized as linear ones [out, in]."""
    tiny("gpt2").save_pretrained(tmp_path)
    ours, dense = load_base(tmp_path, dtype="float32", quantize="nf4").model, tiny("gpt2")
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 8
    for name, module in layers.items():
        dense.get_submodule(name).weight.data.copy_(module.quantized.dequantize().T)
    assert torch.equal(logits(ours), logits(dense))


def test_the_fingerprint_covers_scales(plain: Path, tmp_path: Path) -> None:
    """The fingerprint of a quantized weight is the same from memory and from files, and differs where a scale does."""
    name = "model.layers.0.self_attn.q_proj.weight"
    ours = load_base(plain, dtype="float32", quantize="nf4")
    known = weight_fingerprints(ours, [name])[name]
    ours.model.save_pretrained(tmp_path / "saved")
    assert weight_fingerprints(load_base(tmp_path / "saved", dtype="float32"), [name])[name] == known
    ours.model.get_submodule(name.removesuffix(".weight")).quantized.absmax[0] ^= 1
    assert weight_fingerprints(ours, [name])[name] != known


Q = "model.layers.1.mlp.up_proj."
HOSTILE: dict[str, tuple[Any, str]] = {
    "block size": (lambda t: _edit_state(t, blocksize=128), r"expected 64 blocks of 128"),
    "unknown block size": (lambda t: _edit_state(t, blocksize=48), r"its blocksize is 48"),
    "truncated absmax": (
        lambda t: t.update({Q + "weight.absmax": t[Q + "weight.absmax"][:-3].clone()}),
        r"absmax: expected 128 blocks",
    ),
    "another map": (
        lambda t: t[Q + "weight.quant_map"].add_(0.01),
        r"quant_map: its values are not those of the format",
    ),
    "another nested map": (lambda t: t[Q + "weight.nested_quant_map"].mul_(2), r"nested_quant_map: its values"),
    "another shape": (
        lambda t: _edit_state(t, shape=[64, 128]),
        r"made from a weight of shape \[64, 128\]; expected \[128, 64\]",
    ),
    "fewer bytes": (
        lambda t: t.update({Q + "weight": t[Q + "weight"][:-1].clone()}),
        r"expected 4,096 bytes for 8,192 numbers",
    ),
    "no absmax": (lambda t: t.pop(Q + "weight.absmax"), r"weight.absmax is missing"),
    "no settings": (lambda t: t.pop(Q + "weight.quant_state.bitsandbytes__nf4"), r"its quant_state is missing"),
    "a plain weight": (lambda t: _plain(t), r"expected a weight in nf4, found a plain one"),
    "another type": (lambda t: _edit_state(t, quant_type="int4"), r"its quant_type is 'int4'"),
}


def _edit_state(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    key = Q + "weight.quant_state.bitsandbytes__nf4"
    settings = {**json.loads(bytes(tensors[key].tolist())), **changes}
    tensors[key] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def _plain(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.startswith(Q)]:
        del tensors[key]
    tensors[Q + "weight"] = torch.zeros(128, 64)


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_do_not_fit_are_refused(name: str, plain: Path, tmp_path: Path) -> None:
    """A damaged or foreign weight is refused with its name and the reason, before anything is computed with it."""
    change, reason = HOSTILE[name]
    load_base(plain, dtype="float32", quantize="nf4").model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=reason) as error:
        load_base(tmp_path / "base", dtype="float32")
    assert "model.layers.1.mlp.up_proj" in str(error.value)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("gptq", r"quantized with gptq, whose layers need kernels .* --quantize nf4"),
        ("awq", r"quantized with awq, whose layers need kernels"),
        ("mxfp4", r"mxfp4, which has no gradient; use a bfloat16 copy"),
        ("gguf", r"give the \.gguf file itself"),
        ("compressed-tensors", r"compressed-tensors, which is not supported"),
    ],
)
def test_formats_that_cannot_train_are_refused_by_name(method: str, reason: str, plain: Path, tmp_path: Path) -> None:
    """The error names the method and the way to a base that can be trained on."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BaseModelError, match=reason):
        load_base(folder)


def test_a_quantized_base_is_not_quantized_again(plain: Path, tmp_path: Path) -> None:
    """Another format than that of the files is an error; the same one is not a contradiction."""
    load_base(plain, dtype="float32", quantize="int8").model.save_pretrained(tmp_path / "base")
    load_base(tmp_path / "base", dtype="float32", quantize="int8")
    with pytest.raises(BaseModelError, match=r"are quantized to int8, and cannot be quantized to nf4"):
        load_base(tmp_path / "base", quantize="nf4")
    with pytest.raises(BaseModelError, match=r"'int3' is not one of nf4, fp4, int8"):
        load_base(plain, quantize="int3")


@pytest.mark.parametrize("change", ["expert", "row"])
def test_weights_of_another_shape_are_not_quantized(change: str, tmp_path: Path) -> None:
    """Files with one expert fewer, or a layer of fewer rows, are refused while they are quantized, as they are when plain."""
    tiny("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "expert":
        del tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
        reason = r"model.layers.1.mlp.experts.down_proj has shape \[3, 32, 16\] in the files and \[4, 32, 16\]"
    else:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name][:-8].clone()
        reason = r"q_proj.weight has shape \[\d+, 32\] in the files and \[\d+, 32\] by config.json"
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for quantize in (None, "nf4"):
        with pytest.raises(BaseModelError, match=reason):
            load_base(tmp_path, dtype="float32", quantize=quantize)


def test_the_order_of_a_gpu_kernel_is_refused(plain: Path, tmp_path: Path) -> None:
    """int8 numbers that are packed for a kernel, and not row by row, are refused with the reason."""
    load_base(plain, dtype="float32", quantize="int8").model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}weight_format"] = torch.tensor(1, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"up_proj: its numbers are packed in the order 1 of a GPU's kernel"):
        load_base(tmp_path / "base", dtype="float32")


def write_fp8(plain: Path, out: Path, block: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Write a copy of a plain folder in FP8 with a scale for each block; returns the weights that it stands for."""
    out.mkdir()
    for file in plain.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    rows, columns = block or (128, 128)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, columns],
    }
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors, expected = load_file(out / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name]
        grid = (
            torch.stack([torch.stack([b.abs().max() for b in a.split(columns, 1)]) for a in weight.split(rows)]) / 448
        )
        scale = grid.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = grid
        expected[name] = tensors[name].float() * scale
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return expected


def test_fp8_weights_are_dequantized(plain: Path, tmp_path: Path) -> None:
    """A fine-grained FP8 checkpoint is read as plain weights, and the load says so."""
    dense = tiny("llama", **SIZES)
    dense.load_state_dict(write_fp8(plain, tmp_path / "base"), strict=False)
    base = load_base(tmp_path / "base", dtype="float32")
    assert (logits(base.model) - logits(dense)).abs().max() < 1e-4
    assert any("dequantized" in line for line in base.notes)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_fp8_weights_are_quantized_while_they_are_read(arch: str, tmp_path: Path) -> None:
    """The same numbers as those of the dequantized weights, experts among them, with blocks that end beyond the weight."""
    dense = tiny(arch)
    dense.save_pretrained(tmp_path / "plain")
    expected = write_fp8(tmp_path / "plain", tmp_path / "fp8", [48, 48])
    tensors = {**load_file(tmp_path / "plain" / "model.safetensors"), **expected}
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("float32", "bfloat16"):
        found, known = (
            load_base(tmp_path / name, dtype=dtype, quantize="nf4").model.state_dict() for name in ("fp8", "plain")
        )
        assert found.keys() == known.keys() and any("quant_state" in name for name in found)
        assert all(torch.equal(value, known[name]) for name, value in found.items())
    files = skeleton(tmp_path / "fp8").folder
    assert set(files.files) == set(tensors)
    assert all(torch.allclose(files.get(name), value) for name, value in tensors.items())


def test_fp8_files_that_do_not_fit_are_refused(plain: Path, tmp_path: Path) -> None:
    """Scales of other blocks, and a weight without scales, are named with the layer."""
    write_fp8(plain, tmp_path / "base", [32, 32])
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}weight_scale_inv"] = tensors[f"{Q}weight_scale_inv"][:3].clone()
    del tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"expected 4 x 2 blocks of 32 x 32") as error:
        load_base(tmp_path / "base", dtype="float32", quantize="nf4")
    assert "layers.0.self_attn.q_proj: weight_scale_inv is missing beside the weight" in str(error.value)
