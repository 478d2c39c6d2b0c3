"""Experts in adapter files: PEFT's target_parameters both ways, the names of earlier releases, 3-D factors, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.tiny import tiny
from torch import Tensor

import veneer
from veneer import DoRA, LoRA
from veneer.checkpoints import read_adapter
from veneer.checkpoints.base_files import skeleton
from veneer.checkpoints.tensors import digest
from veneer.errors import CheckpointError
from veneer.merge.folder import merge_to_folder

ARCHS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "olmoe")
IDS = torch.arange(3, 27).view(2, 12)
LIMIT = 1e-5
DENSE = ("shared_experts.*_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def stack_of(arch: str) -> str:
    return "feed_forward.experts" if arch == "llama4" else "mlp.experts"


def banked(arch: str, method: LoRA | DoRA) -> tuple[Any, veneer.Bank, Tensor]:
    """(model, bank with the moved adapter a, its logits). Layers whose names PEFT takes for the experts' are left out."""
    model: Any = tiny(arch)
    bank = veneer.attach(model)
    if arch == "deepseek_v3":
        method = method.model_copy(update={"exclude_modules": DENSE})
    bank.add("a", method)
    generator = torch.Generator().manual_seed(1)
    for _, _, tensor in bank["a"].named_tensors():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    with bank.use("a"):
        return model, bank, logits(model)


def with_peft(arch: str, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(tiny(arch), folder))


def with_veneer(arch: str, folder: Path) -> Tensor:
    bank = veneer.attach(tiny(arch))
    bank.load(folder, name="b")
    with bank.use("b"):
        return logits(bank.model)


@pytest.mark.parametrize("arch", ARCHS)
def test_target_parameters_come_in(arch: str, tmp_path: Path) -> None:
    """An adapter of PEFT on fused experts computes the same here, and so does one that goes on to be stored expert by expert."""
    names = [f"{stack_of(arch)}.{name}" for name in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=names)
    theirs: Any = get_peft_model(tiny(arch), config)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in theirs.named_parameters():
        if "lora_B" in name:
            tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (logits(tiny(arch)) - expected).abs().max() > 0.1
    bank = veneer.attach(tiny(arch))
    bank.load(tmp_path / "theirs", name="a")
    with bank.use("a"):
        assert (logits(bank.model) - expected).abs().max() <= LIMIT
    bank.save("a", tmp_path / "separate", experts="separate")
    bank.save("a", tmp_path / "fused", experts="fused")
    assert (with_veneer(arch, tmp_path / "separate") - expected).abs().max() <= LIMIT
    assert (with_peft(arch, tmp_path / "fused") - expected).abs().max() <= LIMIT
    ranks = {
        tensor.shape[0]
        for name, tensor in load_file(tmp_path / "fused" / "adapter_model.safetensors").items()
        if "experts" in name and "lora_A" in name
    }
    assert ranks == {12}  # gate_proj and up_proj share A, so the fused rank is what it was


@pytest.mark.parametrize("arch", ARCHS)
def test_target_parameters_go_out(arch: str, tmp_path: Path) -> None:
    """Factors of each part load in PEFT as fused ones, and come back; read without a base, they can be merged into its files."""
    model, bank, expected = banked(arch, LoRA(r=6, lora_alpha=5))
    bank.save("a", tmp_path / "fused", experts="fused")
    assert (with_peft(arch, tmp_path / "fused") - expected).abs().max() <= LIMIT
    assert (with_veneer(arch, tmp_path / "fused") - expected).abs().max() <= LIMIT
    if arch in ("llama4", "gpt_oss"):
        tiny(arch).save_pretrained(tmp_path / "base")
        adapter = read_adapter(tmp_path / "fused")
        merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "merged")
        merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert (logits(merged) - expected).abs().max() <= LIMIT


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "olmoe"])
def test_separate_experts_load_in_peft(arch: str, tmp_path: Path) -> None:
    """Tensors of each expert have the names of the base's own files, under which PEFT reads them, at the experts' rank."""
    _, bank, expected = banked(arch, LoRA(r=6, lora_alpha=5))
    bank.save("a", tmp_path / "a")
    names = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    own = "block_sparse_moe.experts.3.w1" if arch == "mixtral" else "mlp.experts.3.gate_proj"
    assert f"base_model.model.model.layers.1.{own}.lora_A.weight" in names
    assert (with_peft(arch, tmp_path / "a") - expected).abs().max() <= LIMIT
    adapter = read_adapter(tmp_path / "a")
    assert set(adapter.tensors) == set(bank["a"].tensors)


def test_dora_on_experts_comes_back(tmp_path: Path) -> None:
    """DoRA per expert is stored and read back to the bit; it has no fused form."""
    _, bank, expected = banked("mixtral", DoRA(r=4))
    bank.save("a", tmp_path / "a")
    assert torch.equal(with_veneer("mixtral", tmp_path / "a"), expected)
    with pytest.raises(CheckpointError, match="PEFT's target_parameters have no DoRA"):
        bank.save("a", tmp_path / "b", experts="fused")


def three_dimensional(bank: veneer.Bank, folder: Path, arch: str) -> None:
    """Rewrite a saved adapter's experts as 3-D factors, the factor on the hidden side shared."""
    adapter, tensors = bank["a"], {}
    roles = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for site in adapter.tensors:
        stack, number, part = site.rsplit(".", 2)
        held = {key: value.detach() for key, value in adapter.tensors[site].items()}
        path = f"base_model.model.{stack}.{roles[part]}" if number.isdigit() else f"base_model.model.{site}"
        for key, value in held.items():
            name = f"{path}.{key}.weight"
            if not number.isdigit():
                tensors[name] = value
            elif key == ("lora_B" if part == "down_proj" else "lora_A"):
                tensors[name] = value.unsqueeze(0)
            else:
                tensors[name] = torch.cat([tensors.get(name, value[None][:0]), value[None]])
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_three_dimensional_factors_come_in(arch: str, tmp_path: Path) -> None:
    """Factors [E, r, in] and [1, r, in] under w1, w2 and w3 are those of each expert."""
    model, bank, _ = banked(arch, LoRA(r=2, lora_alpha=4, rank_pattern={"*.experts.*": 2}, target_modules=("experts",)))
    for name, held in bank["a"].tensors.items():
        stack, _, part = name.rsplit(".", 2)
        shared = "lora_B" if part == "down_proj" else "lora_A"
        held[shared].data = bank["a"].tensors[f"{stack}.0.{part}"][shared].data
    with bank.use("a"):
        expected = logits(model)
    three_dimensional(bank, tmp_path / "a", arch)
    assert (with_veneer(arch, tmp_path / "a") - expected).abs().max() <= LIMIT


def changed(folder: Path, change: Any, config: dict[str, Any] | None = None) -> None:
    """Rewrite the tensors of a folder, without its receipt, and some settings."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | (config or {})))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """One expert missing, a wrong number of experts, 3-D factors of another number: refused with the reason, the base as it was."""
    model, bank, _ = banked("qwen3_moe", LoRA(r=4))
    for name, how in (("missing", "separate"), ("count", "fused"), ("half", "fused")):
        bank.save("a", tmp_path / name, experts=how)
    base = logits(tiny("qwen3_moe"))

    def missing(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "experts.3.up_proj" in key]:
            del tensors[key]

    def count(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "experts" in key]:
            tensors[key] = (tensors[key][:-1] if "lora_A" in key else tensors[key][:, :-1]).contiguous()

    def half(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "experts" in key and "lora_B" in key]:
            del tensors[key]

    reasons = {
        "missing": (missing, r"experts\.3\.up_proj.*it is incomplete"),
        "count": (count, "not a multiple of 4"),
        "half": (half, "expected lora_A and lora_B of stacked experts, found lora_A"),
    }
    for name, (change, reason) in reasons.items():
        changed(tmp_path / name, change)
        fresh = veneer.attach(tiny("qwen3_moe"))
        with pytest.raises(CheckpointError, match=reason):
            fresh.load(tmp_path / name)
        assert torch.equal(logits(fresh.model), base)


def test_the_other_interleaving_is_refused(tmp_path: Path) -> None:
    """A file whose gate and up rows are interleaved where the base has them one after the other does not pass its probe."""
    model, bank, _ = banked("qwen3_moe", LoRA(r=4))
    bank.save("a", tmp_path / "a", experts="fused")
    file = tmp_path / "a" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for key in [key for key in tensors if "base_layer.lora_B" in key]:
        gate, up = tensors[key].chunk(2)
        tensors[key] = torch.stack([gate, up], 1).flatten(0, 1).contiguous()
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match="checksum differs"):
        veneer.attach(tiny("qwen3_moe")).load(tmp_path / "a")
    receipt = json.loads(metadata["veneer"])
    receipt["tensors"] = digest(tensors)
    save_file(tensors, file, metadata | {"veneer": json.dumps(receipt)})
    with pytest.raises(CheckpointError, match=r"experts.*not what the receipt's probe recorded"):
        veneer.attach(tiny("qwen3_moe")).load(tmp_path / "a")


def test_shared_factors_are_shared_again(tmp_path: Path) -> None:
    """A file holds a copy of a shared factor for each expert; reading it makes one of them."""
    _, bank, expected = banked("mixtral", LoRA(r=4, shared_outer=True))
    bank.save("a", tmp_path / "a")
    fresh = veneer.attach(tiny("mixtral"))
    adapter = fresh.load(tmp_path / "a")
    assert len(fresh.parameters("a")) == len(bank.parameters("a")) and adapter.method.shared_outer
    with fresh.use("a"):
        assert torch.equal(logits(fresh.model), expected)
