"""Adapters whose layers have earlier names, or those of the text model alone, act on the layers that these are today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.checkpoints.architectures import build, logits
from tests.checkpoints.helpers import load_peft
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import veneer
from veneer import DoRA, LoRA
from veneer.cli.main import main
from veneer.errors import CheckpointError

PREFIX = "base_model.model."
EARLIER = {
    "gemma3": ("model.language_model.", "language_model.model."),
    "llava": ("model.language_model.", "language_model.model."),
    "llava_onevision": ("model.language_model.", "language_model.model."),
    "mistral3": ("model.language_model.", "language_model.model."),
    "paligemma": ("model.language_model.", "language_model.model."),
    "mllama": ("model.language_model.", "language_model.model."),
    "internvl": ("model.language_model.", "language_model.model."),
    "qwen2_vl": ("model.language_model.", "model."),
    "qwen2_5_vl": ("model.language_model.", "model."),
}
"""{architecture: (start of a language layer's name today, and before the multimodal models were renamed)}."""


def written(arch: str, folder: Path, method: LoRA | DoRA | None = None) -> Tensor:
    """Save an adapter of the architecture; returns its logits."""
    bank = veneer.attach(build(arch))
    adapter = bank.add("a", method or LoRA(r=2, lora_alpha=4))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    bank.save("a", folder)
    with bank.use("a"):
        return logits(bank.model)


def rename(folder: Path, new: str, old: str, *, receipt: bool = False) -> None:
    """Give the layers of a folder earlier names, in its tensors and in full names of its settings; without ``receipt`` drop it."""
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    with safe_open(file, "pt") as opened:
        metadata: dict[str, str] = opened.metadata()
    tensors = {name.replace(PREFIX + new, PREFIX + old): value for name, value in load_file(file).items()}
    assert set(tensors) != set(load_file(file))
    save_file(tensors, file, metadata=metadata if receipt else {"format": "pt"})
    settings.write_text(settings.read_text().replace(f'"{new}', f'"{old}'))


def loaded(model: nn.Module, folder: Path) -> tuple[Tensor, list[str]]:
    """Logits of a model under the adapter of a folder, and the notes of its reading."""
    bank = veneer.attach(model)
    notes: list[str] = bank.load(folder, name="a").meta["notes"]
    with bank.use("a"):
        found = logits(model)
    bank.detach()
    return found, notes


@pytest.mark.parametrize("arch", EARLIER)
def test_earlier_names_are_read_by_the_table(arch: str, tmp_path: Path) -> None:
    """An adapter from before its model's modules were renamed computes what it does under today's names, as in PEFT, and says so."""
    expected = written(arch, tmp_path)
    rename(tmp_path, *EARLIER[arch])
    found, notes = loaded(build(arch), tmp_path)
    assert torch.equal(found, expected)
    assert any("named as in an earlier version" in note and EARLIER[arch][1] in note for note in notes)
    if EARLIER[arch][1] != "model.":  # PEFT takes this start off before it applies the table
        assert (logits(load_peft(build(arch), tmp_path)) - expected).abs().max() <= 1e-5


def test_ranks_and_scales_by_earlier_names(tmp_path: Path) -> None:
    """Patterns with full earlier names mean the same layers."""
    method = LoRA(
        r=2,
        lora_alpha=4,
        rank_pattern={"model.language_model.layers.0.self_attn.q_proj": 3},
        alpha_pattern={"model.language_model.layers.1.self_attn.q_proj": 9.0},
    )
    expected = written("gemma3", tmp_path, method)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    full = {"rank_pattern": {"model.language_model.layers.0.self_attn.q_proj": 3}}
    full["alpha_pattern"] = {"model.language_model.layers.1.self_attn.q_proj": 9}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **full}))
    rename(tmp_path, *EARLIER["gemma3"])
    assert torch.equal(loaded(build("gemma3"), tmp_path)[0], expected)


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    """A file with one layer under its earlier and its present name is ambiguous."""
    written("gemma3", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name.replace("model.language_model.", "language_model.model.")] = tensors[name] + 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"language_model\.model\..*are the same tensor of the same layer"):
        loaded(build("gemma3"), tmp_path)


def inner(model: Any) -> Any:
    """The language model inside a multimodal one."""
    return model.model.language_model


def sharing(arch: str) -> tuple[nn.Module, nn.Module]:
    """A multimodal model and a text model with the same language weights."""
    whole: Any = build(arch)
    alone: Any = AutoModelForCausalLM.from_config(whole.config.get_text_config()).eval()
    alone.model.load_state_dict(inner(whole).state_dict())
    alone.lm_head.weight = nn.Parameter(whole.lm_head.weight.detach().clone())
    return whole, alone


@pytest.mark.parametrize(
    ("arch", "method"),
    [
        ("llava", LoRA(r=2, lora_alpha=4)),
        ("internvl", DoRA(r=2, lora_alpha=4)),
        ("gemma3", LoRA(r=2, lora_alpha=4)),
        ("mistral3", DoRA(r=2, lora_alpha=4)),
        ("llava_onevision", LoRA(r=2, lora_alpha=4)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_an_adapter_moves_between_a_text_model_and_the_multimodal_one(
    arch: str, method: LoRA | DoRA, tmp_path: Path
) -> None:
    """The receipt's base weights and probes are verified under the names that they were recorded by; another base is refused."""
    whole, alone = sharing(arch)
    for source, target, folder in ((alone, whole, tmp_path / "text"), (whole, alone, tmp_path / "whole")):
        bank = veneer.attach(source)
        adapter = bank.add("a", method)
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        bank.save("a", folder)
        with bank.use("a"):
            expected = logits(source)
        bank.detach()
        found, notes = loaded(target, folder)
        assert (found - expected).abs().max() <= 1e-5
        assert any("are those of another model of this family" in note for note in notes)
        assert not any("receipt" in note for note in notes)
    with pytest.raises(CheckpointError, match="this is not the base"):
        loaded(build(arch, seed=9), tmp_path / "text")


def test_layers_of_the_vision_tower_are_none_of_a_text_model(tmp_path: Path) -> None:
    """An adapter that also acts on images is refused by a text model, whatever its language layers are named."""
    written("llava", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for half in "AB":
        name = f"{PREFIX}model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_{half}.weight"
        tensors[name] = torch.zeros(2, 32) if half == "A" else torch.zeros(32, 2)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"vision_tower.*the base has no such layer"):
        loaded(build("llama"), tmp_path)


def test_files_alone_are_read_by_the_table_too(tmp_path: Path) -> None:
    """``veneer merge`` of a folder with earlier names gives the model that the adapter makes."""
    expected = written("gemma3", tmp_path / "adapter")
    build("gemma3").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    rename(tmp_path / "adapter", *EARLIER["gemma3"])
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    names = sorted({name.rpartition(".")[2] for name in settings["target_modules"]})
    file.write_text(json.dumps({**settings, "target_modules": names}))
    words = ["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "merged")]
    assert main(words) == 0
    merged = veneer.load_base(tmp_path / "merged", dtype="float32").model
    assert (logits(merged) - expected).abs().max() <= 1e-4
