"""Adapters on quantized models: beside PEFT with bitsandbytes, beside the dense model, and with layers of bitsandbytes themselves."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.made import nudge, tensor_hash
from tests.tiny import tiny
from torch import Tensor

from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.models.load import load_base

IDS = torch.randint(3, 320, (4, 12), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved as a folder."""
    path = tmp_path_factory.mktemp("plain")
    tiny("llama", **SIZES).save_pretrained(path)
    return path


def ours(folder: Path, format: str = "nf4") -> Any:
    return load_base(folder, dtype="float32", quantize=format).model


def theirs(folder: Path) -> Any:
    """The same model with layers of bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    import transformers

    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **four)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    return model.requires_grad_(False)


def dense(model: Any) -> Any:
    """A plain model with the dequantized weights."""
    plain = tiny("llama", **SIZES)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data.copy_(module.quantized.dequantize())
    return plain


def losses(model: Any, parameters: list[Any], steps: int = 20) -> list[float]:
    """Train on one batch with AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def bytes_of(model: Any) -> dict[str, str]:
    return {name: tensor_hash(value) for name, value in model.state_dict().items()}


def test_qlora_trains_as_peft_does_with_bitsandbytes(folder: Path) -> None:
    """The losses of twenty steps are those of PEFT on bitsandbytes' layers, from the same factors, within 1e-4."""
    import peft

    reference = theirs(folder).train()
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    model: Any = peft.get_peft_model(reference, peft.LoraConfig(**options, task_type="CAUSAL_LM"))
    quantized = ours(folder)
    bank = attach(quantized)
    bank.add("a", LoRA(**options))
    for site, tensors in bank["a"].tensors.items():
        layer = model.base_model.model.get_submodule(site)
        tensors["lora_A"].data.copy_(layer.lora_A["default"].weight)
    with bank.use("a"):
        found = losses(quantized, bank.parameters("a"))
    expected = losses(model, [p for p in model.parameters() if p.requires_grad])
    assert found[-1] < found[0] - 0.1
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", [LoRA(r=4), DoRA(r=4)], ids=["lora", "dora"])
def test_training_is_that_of_the_dense_model(method: LoRA | DoRA, format: str, folder: Path) -> None:
    """Gradients of adapters and of inputs are those on the dequantized weights within 1e-6, and so are losses and logits; the base keeps
    its bytes."""
    quantized = ours(folder, format)
    before = bytes_of(quantized)
    plain = dense(quantized)
    banks = [attach(model) for model in (quantized, plain)]
    grads, trained = [], []
    for model, bank in zip((quantized, plain), banks, strict=True):
        nudge(bank.add("a", method, seed=1), by=0.05)
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with bank.use("a"):
            model(inputs_embeds=x, labels=IDS).loss.backward()
            grads.append([x.grad, *(p.grad for p in bank.parameters("a"))])
            bank["a"].requires_grad_()
            for p in bank.parameters("a"):
                p.grad = None
            trained.append(losses(model, bank.parameters("a"), 5))
            with torch.no_grad():
                grads[-1].append(model(IDS).logits)
    for one, other in zip(*grads, strict=True):
        assert one is not None and other is not None and (one - other).norm() <= 1e-6 * other.norm()
    assert trained[0] == pytest.approx(trained[1], abs=1e-5)
    assert bytes_of(quantized) == before


def rows(model: Any, bank: Bank) -> Tensor:
    with bank.use(["lora", None, "dora", {"lora": 0.7, "dora": 0.3}]), torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def test_rows_of_one_batch_may_differ(folder: Path) -> None:
    """Base rows, LoRA, DoRA and a mix in one batch are those on the dequantized weights."""
    quantized = ours(folder)
    found = []
    for model in (quantized, dense(quantized)):
        bank = attach(model)
        nudge(bank.add("lora", LoRA(r=3), seed=1), by=0.05)
        nudge(bank.add("dora", DoRA(r=4), seed=2), by=0.05)
        found.append(rows(model, bank))
    assert (found[0] - found[1]).abs().max() < 1e-5
    with torch.no_grad():
        assert torch.allclose(found[0][1], quantized(IDS).logits[1], atol=1e-6)


def test_layers_of_bitsandbytes_are_adapted_and_keep_their_bytes(folder: Path) -> None:
    """A model that transformers loaded with bitsandbytes takes adapters; training, evaluating and generating leave its bytes alone."""
    reference = theirs(folder)
    before = bytes_of(copy.deepcopy(reference))
    expected_model = dense(ours(folder))
    bank, plain = attach(reference), attach(expected_model)
    assert len(bank.sites) == len(plain.sites)
    for one in (bank, plain):
        nudge(one.add("a", DoRA(r=4), seed=1), by=0.05)
    with bank.use("a"), plain.use("a"):
        assert losses(reference, bank.parameters("a"), 3) == pytest.approx(
            losses(expected_model, plain.parameters("a"), 3), abs=1e-4
        )
        reference.eval()
        with torch.no_grad():
            assert (reference(IDS).logits - expected_model(IDS).logits).abs().max() < 1e-4
            reference.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
        x = reference.get_input_embeddings()(IDS).detach().requires_grad_()
        reference(inputs_embeds=x).logits.sum().backward()
        assert x.grad is not None and x.grad.abs().max() > 0
    bank.detach()
    assert bytes_of(reference) == before


def test_a_weight_that_bitsandbytes_packed_is_put_back(folder: Path) -> None:
    """A model that was evaluated before it is attached has its own packing, which rounds scales: the weights are put back, and a warning
    says so."""
    reference = theirs(folder).eval()
    with torch.no_grad():
        reference(IDS)
    packed = any(
        getattr(p.quant_state, "packing_format_for_cpu", False)
        for p in reference.parameters()
        if hasattr(p, "quant_state")
    )
    expected = dense(ours(folder))
    with pytest.warns(UserWarning, match="rounded their scales") if packed else contextlib.nullcontext():
        bank = attach(reference)
    for name, site in bank.sites.items():
        torch.testing.assert_close(site.dense, expected.get_submodule(name).weight, rtol=1e-2, atol=1e-3, msg=name)


def test_a_dense_override_replaces_a_quantized_weight(folder: Path) -> None:
    """`modules_to_save` trains a dense copy of a quantized layer, from its dequantized values."""
    quantized = ours(folder)
    bank = attach(quantized)
    with torch.no_grad():
        expected = quantized(IDS).logits
    bank.add("a", LoRA(r=2, target_modules="q_proj", modules_to_save="down_proj"))
    with bank.use("a"):
        assert torch.allclose(quantized(IDS).logits, expected, atol=1e-5)
        losses(quantized, bank.parameters("a"), 1)
    weight = bank["a"].overrides["model.layers.0.mlp.down_proj"]["weight"]
    assert weight.shape == (64, 128) and not torch.equal(weight, bank.sites["model.layers.0.mlp.down_proj"].dense)
    assert bank.merged_state_dict("a")["model.layers.0.mlp.down_proj.weight"].shape == (64, 128)
