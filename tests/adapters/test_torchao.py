"""Adapters on weights of torchao: LoRA and DoRA train, rows differ and adapters are merged, as on the dequantized weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.adapters.made import nudge
from tests.tiny import tiny
from torch import nn

from veneer.adapters import DoRA, LoRA, attach
from veneer.errors import TargetError
from veneer.models.quantized.size import parameter_count

IDS = torch.randint(3, 320, (4, 12), generator=torch.Generator().manual_seed(0))


def quantized(config: str) -> tuple[Any, Any]:
    """(a model with weights of torchao, a plain one with their values)."""
    configs = pytest.importorskip("torchao.quantization")
    model, plain = tiny("llama"), tiny("llama")
    configs.quantize_(model, getattr(configs, config)())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            plain.get_submodule(name).weight.data.copy_(module.weight.dequantize())  # type: ignore[operator]
    return model.requires_grad_(False), plain


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_training_and_merging_are_those_on_the_dequantized_weights(config: str) -> None:
    """Logits of mixed rows, gradients of adapters and inputs, and merged weights are those of the plain model."""
    model, plain = quantized(config)
    found = []
    for one in (model, plain):
        bank = attach(one)
        nudge(bank.add("lora", LoRA(r=3), seed=1), by=0.05)
        nudge(bank.add("dora", DoRA(r=4), seed=2), by=0.05)
        x = one.get_input_embeddings()(IDS).detach().requires_grad_()
        with bank.use(["lora", None, "dora", {"lora": 0.7, "dora": 0.3}]):
            logits = one(inputs_embeds=x).logits
            logits.square().mean().backward()
        grads = [p.grad for name in ("lora", "dora") for p in bank.parameters(name)]
        merged = bank.merged_state_dict("dora")["model.layers.0.mlp.up_proj.weight"]
        found.append([logits.detach(), x.grad, *grads, merged])
    assert parameter_count(model) == parameter_count(plain)
    for here, expected in zip(*found, strict=True):
        assert here is not None and type(here) is torch.Tensor
        assert (here - expected).norm() <= 1e-4 * expected.norm()


def test_quantized_activations_are_refused() -> None:
    """No gradient passes through them, so a layer that quantizes its inputs is named with the way out."""
    model, _ = quantized("Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(TargetError, match="with quantized activations, through which no gradient passes"):
        attach(model).add("a", LoRA(r=2, target_modules="q_proj"))
