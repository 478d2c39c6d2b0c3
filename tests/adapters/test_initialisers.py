"""PiSSA and OLoRA: the same training as in PEFT, with a base that stays as it is, saved as plain LoRA of twice the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.checkpoints.helpers import inputs, load_peft, outputs
from tests.tiny import tiny

import veneer
from veneer import DoRA, LoRA
from veneer.config import TrainOptions
from veneer.errors import ConfigError, TargetError

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_step_and_the_saved_folder_are_those_of_peft(init: str, rslora: bool, tmp_path: Path) -> None:
    """The start is the base to rounding; after one step of SGD the outputs are PEFT's, whose base was changed; the folder is plain LoRA."""
    model, twin = tiny("llama"), tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = outputs(model)
    bank = veneer.attach(model)
    adapter = bank.add(
        "a", LoRA(**{**QV, "target_modules": ("q_proj", "v_proj")}, init_lora_weights=init, use_rslora=rslora)
    )  # type: ignore[arg-type]
    with bank.use("a"):
        assert (outputs(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    theirs = get_peft_model(twin, LoraConfig(**QV, init_lora_weights=init, use_rslora=rslora))
    trained = [p for name, p in theirs.named_parameters() if "lora_" in name]
    for p in trained:
        p.requires_grad_(True)
    assert adapter.num_parameters() == sum(p.numel() for p in trained)

    held = {
        key: value[4:].clone() if key.endswith("A") else value[:, 4:].clone()
        for _, key, value in adapter.named_tensors()
    }
    targets = torch.tensor([3, 5])
    with bank.use("a", training=True):
        torch.nn.functional.cross_entropy(_last(model), targets).backward()
    torch.nn.functional.cross_entropy(_last(theirs), targets).backward()
    torch.optim.SGD(bank.parameters("a"), lr=0.5).step()
    torch.optim.SGD(trained, lr=0.5).step()
    with bank.use("a"), torch.no_grad():
        found = outputs(model)
        assert (found - expected).abs().max() > 1e-3
        assert (found - outputs(theirs)).abs().max() <= 1e-5
    for _, key, value in list(adapter.named_tensors())[-2:]:
        assert torch.equal(value[4:] if key.endswith("A") else value[:, 4:], held[key])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    bank.save("a", tmp_path / "a")
    again = load_peft(tiny("llama"), tmp_path / "a")
    assert again.peft_config["default"].r == 8
    with torch.no_grad():
        assert (outputs(again) - found).abs().max() <= 1e-5
    merged = bank.merged_state_dict("a")
    twin = tiny("llama")
    twin.load_state_dict(merged)
    with torch.no_grad():
        assert (outputs(twin) - found).abs().max() <= 1e-5


def _last(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs(model)).logits
    return logits[:, -1]


def test_dora_starts_from_the_base_too() -> None:
    """The magnitude is the base's row norm, so the first change is zero to rounding."""
    model = tiny("llama")
    expected = outputs(model)
    bank = veneer.attach(model)
    bank.add("a", DoRA(r=2, init_lora_weights="pissa"))
    with bank.use("a"), torch.no_grad():
        assert (outputs(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_what_has_no_factors_is_refused() -> None:
    """Embeddings, ranks above the weight's, and options that would move the held half."""
    bank = veneer.attach(tiny("llama"))
    with pytest.raises(TargetError, match="takes factors of a linear layer's weight"):
        bank.add("a", LoRA(r=2, target_modules="embed_tokens", init_lora_weights="pissa"))
    with pytest.raises(TargetError, match="r=64"):
        bank.add("a", LoRA(r=64, target_modules="k_proj", init_lora_weights="olora"))
    with pytest.raises(ConfigError, match="orthogonal_to would change them"):
        TrainOptions(data=("rows.jsonl",), init_lora_weights="pissa", orthogonal_to=("runs/a",))


def test_weight_decay_leaves_the_held_half() -> None:
    """An optimizer of one's own decays every value that it is given; the held half is put back before the adapter is used again."""
    model = tiny("llama")
    bank = veneer.attach(model)
    adapter = bank.add("a", LoRA(r=2, target_modules="q_proj", init_lora_weights="pissa"))
    before = {(site, key): value.detach().clone() for site, key, value in adapter.named_tensors()}
    optimizer = torch.optim.AdamW(bank.parameters("a"), lr=0.1, weight_decay=0.5)
    with bank.use("a", training=True):
        model(**inputs(model)).logits.square().mean().backward()
    optimizer.step()
    with bank.use("a"):
        pass
    for site, key, value in adapter.named_tensors():
        (free, held), (was_free, was_held) = (
            one.detach().chunk(2, 0 if key == "lora_A" else 1) for one in (value, before[site, key])
        )
        assert torch.equal(held, was_held) and not torch.equal(free, was_free)
