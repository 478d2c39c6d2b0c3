"""GGUF adapters: what stands in the file, by llama.cpp's own rule for scales and rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tests.compose.made import METHODS, trained
from tests.tiny import tiny
from torch import Tensor

from veneer.adapters import Adapter, DoRA, LoRA, attach
from veneer.checkpoints.foreign.gguf import (
    FAMILIES,
    GgufLayout,
    gguf_factors,
    interleaved,
    layout_of,
    read_gguf,
    write_gguf,
)
from veneer.errors import BaseModelError, ExportError
from veneer.models.load import load_base

ARCHS = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "granite", "gpt2")


def layout(arch: str) -> tuple[torch.nn.Module, GgufLayout]:
    model = tiny(arch)
    bank = attach(model)
    bank.detach()
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}  # type: ignore[union-attr, operator]
    return model, layout_of(config, tied=bool(bank.tied))


def what_llama_adds(file: Path, base: str) -> Tensor:
    """The change that llama.cpp makes to a base tensor: B A times alpha over B's own rank."""
    tensors, fields = read_gguf(file)
    a, b = tensors[f"{base}.lora_a"].double(), tensors[f"{base}.lora_b"].double()
    return fields["adapter.lora.alpha"] / b.shape[1] * b @ a


def llama_rows(weight: Tensor, heads: int) -> Tensor:
    """The order of llama's rows, member by member: in each head, row 2 i is the model's row i and row 2 i + 1 its row i + d / 2."""
    size = weight.shape[0] // heads
    order = [head * size + (i % 2) * (size // 2) + i // 2 for head in range(heads) for i in range(size)]
    return weight[order]


def wanted_at(adapter: Adapter, site: str, name: str, where: GgufLayout) -> Tensor:
    wanted = adapter.delta_2d(site).double()
    if where.reorders and name.split(".")[-2] in ("attn_q", "attn_k"):
        return llama_rows(wanted, where.heads if "attn_q" in name else where.key_value_heads)
    return wanted


@pytest.mark.parametrize("arch", ARCHS)
def test_every_family_has_a_place_for_every_site(tmp_path: Path, arch: str) -> None:
    """Each adapted layer of each known family gets a tensor pair of the right shapes; q and k of llama's kind are reordered."""
    model, where = layout(arch)
    assert type(model).__name__ in FAMILIES
    adapter = trained(model, LoRA(r=4, lora_alpha=8))
    write_gguf(adapter, tmp_path / "a.gguf", where)
    tensors, fields = read_gguf(tmp_path / "a.gguf")
    assert len(tensors) == 2 * len(adapter.tensors)
    assert fields["general.architecture"] == where.family
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    for site in adapter.tensors:
        name = where.name(site)
        assert name is not None
        found = what_llama_adds(tmp_path / "a.gguf", name)
        assert torch.allclose(found, wanted_at(adapter, site, name, where), atol=1e-6)


def _with_images(name: str) -> torch.nn.Module:
    """A tiny multimodal model with a text part of a known family."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text: dict[str, Any] = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
    rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    qwen = {
        "depth": 1,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
        "out_hidden_size": 32,
    }
    pixels = {"image_size": 16, "patch_size": 8}
    make: dict[str, Callable[[], Any]] = {
        "Gemma3": lambda: transformers.Gemma3Config(
            text_config=text, vision_config={**vision, **pixels}, mm_tokens_per_image=4
        ),
        "Llava": lambda: transformers.LlavaConfig(
            text_config={**text, "model_type": "mistral"},
            vision_config={**vision, **pixels, "model_type": "clip_vision_model"},
        ),
        "Qwen2VL": lambda: transformers.Qwen2VLConfig(
            text_config={**text, **rotary}, vision_config={**qwen, "hidden_size": 32}
        ),
        "Qwen3VL": lambda: transformers.Qwen3VLConfig(
            text_config={**text, **rotary}, vision_config={**qwen, "deepstack_visual_indexes": []}
        ),
    }
    config = make[name]()
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "family", "reorders"),
    [
        ("Gemma3", "gemma3", False),
        ("Llava", "llama", True),
        ("Qwen2VL", "qwen2vl", False),
        ("Qwen3VL", "qwen3vl", False),
    ],
)
def test_the_text_part_of_a_model_with_images(tmp_path: Path, name: str, family: str, reorders: bool) -> None:
    """An adapter on the language model has the tensors of its text family, in its order; the images' part has none."""
    model = _with_images(name)
    bank = attach(model)
    text = [site for site in bank.sites if "language_model" in site and "embed" not in site]
    adapter = trained(model, LoRA(r=2, target_modules=text))
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}  # type: ignore[union-attr, operator]
    where = layout_of(config, tied=False)
    assert (where.family, where.reorders, where.blocks) == (family, reorders, 2)
    write_gguf(adapter, tmp_path / "a.gguf", where)
    tensors, fields = read_gguf(tmp_path / "a.gguf")
    assert fields["general.architecture"] == family and len(tensors) == 2 * len(text)
    site = next(site for site in text if site.endswith("layers.1.self_attn.q_proj"))
    wanted = wanted_at(adapter, site, "blk.1.attn_q.weight", where)
    torch.testing.assert_close(
        what_llama_adds(tmp_path / "a.gguf", "blk.1.attn_q.weight"), wanted, rtol=1e-5, atol=1e-7
    )
    images = [site for site in bank.sites if "language_model" not in site and "lm_head" not in site]
    assert images and not any(where.name(site) for site in images)


def test_a_text_part_of_an_unknown_family_is_refused() -> None:
    """The message names the class of the text part."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"architectures": ["ZambaForCausalLM"]},
    }
    with pytest.raises(ExportError, match="the text part ZambaForCausalLM is not one of the supported"):
        layout_of(config, tied=False)


@pytest.mark.parametrize("method", ["lora", "rslora", "pattern"])
def test_scales_are_true(tmp_path: Path, method: str) -> None:
    """rsLoRA, and other ranks and alphas at some sites, come out as they are under llama.cpp's one alpha."""
    model, where = layout("llama")
    adapter = trained(model, METHODS[method])
    write_gguf(adapter, tmp_path / "a.gguf", where)
    for site in adapter.tensors:
        name = where.name(site)
        assert name is not None
        found = what_llama_adds(tmp_path / "a.gguf", name)
        assert torch.allclose(found, wanted_at(adapter, site, name, where), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-7), ("f16", 1e-3), ("bf16", 8e-3)])
def test_dtypes(tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Factors are stored in the dtype asked for, within its rounding."""
    model, where = layout("qwen3")
    adapter = trained(model)
    size = write_gguf(adapter, tmp_path / "a.gguf", where, dtype=dtype)
    assert size == (tmp_path / "a.gguf").stat().st_size
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {dtype.upper()}
    exact = gguf_factors(adapter, where, 4.0)
    stored, _ = read_gguf(tmp_path / "a.gguf")
    for name, (a, b) in exact.items():
        assert torch.allclose(stored[f"{name}.lora_a"].float(), a, rtol=tolerance, atol=1e-6)
        assert torch.allclose(stored[f"{name}.lora_b"].float(), b, rtol=tolerance, atol=1e-6)


def test_interleaving_is_a_permutation() -> None:
    """Rows are only moved, head by head."""
    rows = torch.arange(24.0).reshape(24, 1)
    moved = interleaved(rows, 3)
    assert torch.equal(moved.sort(0).values, rows) and torch.equal(moved, llama_rows(rows, 3))
    assert moved[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def refused(adapter: Adapter, where: GgufLayout, folder: Path, says: str, **options: str) -> None:
    with pytest.raises(ExportError, match=says):
        write_gguf(adapter, folder / "a.gguf", where, **options)
    assert list(folder.iterdir()) == []


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    """DoRA, embeddings, tied heads, values of an adapter's own, unknown families, numbers out of range: by name, nothing written."""
    model, where = layout("llama")
    refused(trained(model, DoRA(r=2)), where, tmp_path, "is a DoRA adapter")
    refused(
        trained(model, LoRA(r=2, target_modules=("embed_tokens",))), where, tmp_path, "cannot hold embedding layers"
    )
    refused(trained(model, LoRA(r=2, modules_to_save=("norm",))), where, tmp_path, "it overrides weight")
    big = trained(model)
    with torch.no_grad():
        next(iter(big.tensors.values()))["lora_B"].fill_(1e6)
    refused(big, where, tmp_path, "does not fit the range of f16", dtype="f16")
    refused(trained(model), where, tmp_path, "not one of f32", dtype="q4")
    tied = GgufLayout(where.family, where.blocks, where.heads, where.key_value_heads, where.reorders, tied=True)
    refused(trained(model, LoRA(r=2, target_modules=("lm_head",))), tied, tmp_path, "shares the embedding's weight")
    with pytest.raises(ExportError, match="FalconForCausalLM is not one of the supported GGUF families"):
        layout_of({"architectures": ["FalconForCausalLM"]}, tied=False)
    with pytest.raises(ExportError, match="does not say how many layers"):
        layout_of({"architectures": ["LlamaForCausalLM"]}, tied=False)


@pytest.mark.real
def test_rows_are_in_the_order_of_a_real_base_file() -> None:
    """In the embedded model's own GGUF file the rows of q and k stand as `GgufLayout.rows` puts them, bit for bit."""
    from veneer.models.embedded import find_embedded
    from veneer.models.load import load_base

    base = load_base("smollm2-135m", dtype="float32")
    config = base.model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}  # type: ignore[union-attr, operator]
    where = layout_of(config, tied=True)
    file = {tensor.name: tensor for tensor in gguf.GGUFReader(find_embedded("smollm2-135m")).tensors}
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
        site = f"model.layers.7.{part}"
        name = where.name(site)
        assert name is not None
        stored = torch.from_numpy(gguf.dequantize(file[name].data, file[name].tensor_type))
        weight = base.model.get_submodule(site).weight
        assert torch.equal(stored.reshape(weight.shape), where.rows(name, weight))


def test_a_gguf_adapter_is_no_base(tmp_path: Path) -> None:
    """Given as a base, the file is recognised, and the remedy is told."""
    model, where = layout("llama")
    write_gguf(trained(model, LoRA(r=4)), tmp_path / "a.gguf", where)
    with pytest.raises(BaseModelError, match=r"is an adapter in llama\.cpp's format and no base; give its base"):
        load_base(str(tmp_path / "a.gguf"))
