"""Parts of fused linear layers, adapted by name: q_proj of Phi-3's qkv_proj, up_proj of its gate_up_proj, k and v of GPT-2's c_attn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.made import nudge
from tests.tiny import tiny
from torch import Tensor

import veneer
from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.errors import TargetError

IDS = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(0))
QKV, GATED = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"
METHODS = pytest.mark.parametrize("method", [LoRA, DoRA], ids=["lora", "dora"])


def trained(bank: Bank, name: str = "a") -> None:
    """Three steps of AdamW, whose weight decay moves numbers that have no gradient."""
    optimizer = torch.optim.AdamW(bank.parameters(name), lr=1e-2)
    for _ in range(3):
        with bank.use(name):
            bank.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with bank.use(name):
        pass  # the decay of the last step is undone where the adapter is used, merged or saved


def changed(bank: Bank, site: str) -> list[int]:
    """The outputs of a layer that an adapter changes."""
    delta: Tensor = bank["a"].delta_2d(site, bank.sites[site].weight_2d).abs()
    return (delta.amax(1) > 1e-7).nonzero().flatten().tolist()


@METHODS
def test_only_the_outputs_of_the_part_change(method: Any) -> None:
    """Training moves the part's outputs alone, also with weight decay; the numbers of the others are not counted."""
    bank = attach(tiny("phi3"))
    adapter = bank.add("a", method(r=4, target_modules=("q_proj", "up_proj")))
    assert adapter.parts[QKV] == ("q_proj",) and adapter.parts[GATED] == ("up_proj",)
    magnitudes = 32 + 64 if method is DoRA else 0
    assert adapter.num_parameters() == 2 * (4 * 32 + 32 * 4 + 4 * 32 + 64 * 4 + magnitudes)
    trained(bank)
    assert changed(bank, QKV) == list(range(32)) and changed(bank, GATED) == list(range(64, 128))


@METHODS
def test_a_part_may_be_excluded(method: Any) -> None:
    """all-linear without k_proj changes the outputs of q and v, and all of the other layers; Conv1D's parts are outputs too."""
    bank = attach(tiny("phi3"))
    adapter = bank.add("a", method(r=4, exclude_modules=("k_proj",)))
    assert adapter.parts == {QKV: ("q_proj", "v_proj"), QKV.replace("0", "1"): ("q_proj", "v_proj")}
    trained(bank)
    assert changed(bank, QKV) == [*range(32), *range(48, 64)] and len(changed(bank, GATED)) == 128
    bank = attach(tiny("gpt2"))
    assert bank.add("a", method(r=4, target_modules=("k_proj", "v_proj"))).parts
    trained(bank)
    assert changed(bank, "transformer.h.1.attn.c_attn") == list(range(32, 96))


def test_all_parts_are_the_layer_and_other_names_are_errors() -> None:
    """Naming every part adapts the layer as a whole; a part of another layer, or excluding them all, is told."""
    bank = attach(tiny("phi3"))
    every = LoRA(r=2, target_modules=("q_proj", "k_proj", "v_proj"))
    assert bank.add("a", every).parts == {} and set(bank["a"].tensors) == {QKV, QKV.replace("0", "1")}
    with pytest.raises(TargetError, match='"query" matches nothing'):
        bank.add("b", LoRA(target_modules=("query",)))
    with pytest.raises(TargetError, match="no site is left"):
        bank.add("b", LoRA(target_modules=("q_proj",), exclude_modules=("q_proj",)))


@METHODS
def test_a_folder_keeps_the_parts(method: Any, tmp_path: Path) -> None:
    """Other programs read a folder as an adapter of the fused layer; loaded again, training goes on with the part alone."""
    import json

    bank = veneer.attach(tiny("phi3"))
    bank.add("a", method(r=4, target_modules=("v_proj",)))
    trained(bank)
    bank.save("a", tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["target_modules"] == ["qkv_proj"]
    with bank.use("a"):
        expected = bank.model(IDS).logits.detach()
    other = veneer.attach(tiny("phi3"))
    assert other.load(tmp_path / "a", name="a").parts == bank["a"].parts
    with other.use("a"):
        assert torch.equal(other.model(IDS).logits.detach(), expected)
    other["a"].requires_grad_()
    trained(other)
    assert changed(other, QKV) == list(range(48, 64))


def test_parts_beside_other_adapters() -> None:
    """In a mixed batch the row of an adapter of a part is that of the merged weights."""
    bank = attach(tiny("phi3"))
    bank.add("a", DoRA(r=4, target_modules=("gate_proj",)))
    nudge(bank.add("b", LoRA(r=3)), by=0.05)
    trained(bank)
    with bank.use(["a", "b"]), torch.no_grad():
        found = bank.model(IDS).logits[0]
    plain = tiny("phi3")
    plain.load_state_dict(bank.merged_state_dict("a"))
    with torch.no_grad():
        assert (found - plain(IDS).logits[0]).abs().max() < 1e-5
