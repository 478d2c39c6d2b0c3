"""Stacked experts whose weights are quantized while they are read, beside dense experts with the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.made import tensor_hash
from tests.adapters.test_experts import moved
from tests.tiny import tiny

from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.stack import QuantizedStack
from veneer.models.load import load_base
from veneer.models.quantized.size import parameter_count

IDS = torch.randint(3, 320, (4, 12), generator=torch.Generator().manual_seed(0))


def quantized(folder: Path, arch: str, format: str) -> Any:
    tiny(arch).save_pretrained(folder)
    return load_base(folder, dtype="float32", quantize=format)


def dense(model: Any, arch: str) -> Any:
    """A plain model with the dequantized weights, its experts computed one after the other."""
    plain = tiny(arch)
    plain.config._experts_implementation = "eager"
    for name, module in model.named_modules():
        if isinstance(module, QuantizedStack):
            plain.get_parameter(name).data.copy_(module.dense())
        elif isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data.copy_(module.quantized.dequantize())
    return plain


def banked(model: Any) -> Bank:
    bank = attach(model)
    for seed, (name, method) in enumerate({"lora": LoRA(r=4), "dora": DoRA(r=4)}.items()):
        bank.add(name, method, seed=seed)
        moved(bank, name, seed + 2)
    return bank


@pytest.mark.parametrize(
    ("arch", "format"),
    [("qwen3_moe", "nf4"), ("mixtral", "int8"), ("deepseek_v3", "fp4"), ("gpt_oss", "nf4")],
)
def test_mixed_rows_and_gradients_are_those_of_dense_experts(arch: str, format: str, tmp_path: Path) -> None:
    """Rows of the base, LoRA, DoRA and a mix, and gradients of inputs and adapters, are within 1e-6; the base keeps its bytes."""
    base = quantized(tmp_path, arch, format)
    before = {name: tensor_hash(value) for name, value in base.model.state_dict().items()}
    assert any(isinstance(module, QuantizedStack) for module in base.model.modules())
    assert parameter_count(base.model) == sum(p.numel() for p in tiny(arch).parameters())
    found = []
    for model in (base.model, dense(base.model, arch)):
        bank = banked(model)
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with bank.use(["lora", None, "dora", {"lora": 0.5, "dora": 0.3}]):
            logits = model(inputs_embeds=x).logits
        logits.square().mean().backward()
        grads = {f"{name}.{s}.{k}": p.grad for name in bank.names for s, k, p in bank[name].named_tensors()}
        found.append(({"logits": logits.detach(), "x": x.grad, **grads}, bank.merged_state_dict("dora")))
    assert any("experts" in name and value is not None for name, value in found[0][0].items())
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert value is None or (one[name] - value).norm() <= 1e-6 * value.norm(), name
    assert {name: tensor_hash(value) for name, value in base.model.state_dict().items()} == before


def test_experts_that_cannot_be_quantized_are_named(tmp_path: Path) -> None:
    """Llama 4's experts stay as they are, and the load says so."""
    base = quantized(tmp_path, "llama4", "nf4")
    assert any("the experts of Llama4ForCausalLM stay in float32" in note for note in base.notes)
    assert base.model.model.layers[0].feed_forward.experts.gate_up_proj.dtype == torch.float32
