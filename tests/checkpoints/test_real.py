"""Folders on the embedded model: saved, read back by Veneer and by PEFT, with the same answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.helpers import load_peft, stir

import veneer
from veneer import DoRA, LoRA
from veneer.adapters import Method
from veneer.errors import CheckpointError

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
METHODS = {
    "lora": LoRA(r=8),
    "dora": DoRA(r=8),
    "rows": LoRA(r=4, target_modules=("q_proj",), trainable_token_indices=(1, 2)),
}


@pytest.fixture(scope="module")
def base() -> Any:
    return veneer.load_base("smollm2-135m", dtype="float32")


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_folder_gives_the_same_greedy_tokens(base: Any, name: str, tmp_path: Path) -> None:
    """The folder reloads without a note and answers token for token as before; PEFT's logits agree to 1e-4."""
    ids = base.tokenizer("The three primary colours are", return_tensors="pt").input_ids
    bank = veneer.attach(base.model)
    adapter = bank.add("a", METHODS[name])
    stir(torch.nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "", by=0.01)

    def answer(which: str) -> torch.Tensor:
        with bank.use(which):
            found: torch.Tensor = base.model.generate(ids, max_new_tokens=12, do_sample=False)
        return found

    try:
        before = answer("a")
        bank.save("a", tmp_path / "a", logits=True)
        assert bank.load(tmp_path / "a", name="b").meta["notes"] == []
        assert torch.equal(answer("b"), before)
        with bank.use("a"), torch.no_grad():
            expected = base.model(input_ids=ids).logits
    finally:
        bank.detach()
    theirs = load_peft(copy.deepcopy(base.model), tmp_path / "a")
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - expected).abs().max() <= 1e-4


def eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to 255 levels a row."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to 16 levels in groups of 32, as 4-bit files have them."""
    groups = weight.reshape(-1, 32)
    step = groups.abs().amax(1, keepdim=True) / 7.5
    return ((groups / step).round() * step).reshape(weight.shape)


def revised(weight: torch.Tensor) -> torch.Tensor:
    """Moved by a thousandth, as a later revision is."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return weight + 1e-3 * weight.norm() / weight.numel() ** 0.5 * noise


def shuffled(weight: torch.Tensor) -> torch.Tensor:
    """Other weights of the same shape and size."""
    return weight.flipud().flip(1)


VARIANTS: dict[str, tuple[Any, str]] = {
    "bfloat16": (lambda weight: weight.bfloat16(), "note"),
    "float16": (lambda weight: weight.half(), "note"),
    "8 bits": (eight_bits, "this is a relative of the base"),
    "4 bits": (four_bits, "this is a relative of the base"),
    "revision": (revised, "this is a relative of the base"),
    "other weights": (shuffled, "this is not the base that the adapter was made on"),
}
FEW = ("q_proj", "down_proj")
"""A square and a wide projection of each block: every site costs the same."""


@pytest.mark.parametrize(
    ("method", "variants"),
    [(LoRA(r=8, target_modules=FEW), tuple(VARIANTS)), (DoRA(r=8, target_modules=FEW), ("float16", "4 bits"))],
    ids=["lora", "dora"],
)
def test_variants_of_the_base_are_told_or_refused(
    base: Any, method: Method, variants: tuple[str, ...], tmp_path: Path
) -> None:
    """Another precision is told; quantised copies, a revision and other weights are refused, and load with force="base"."""
    model, first = copy.deepcopy(base.model), dict(base.model.named_parameters())
    bank = veneer.attach(model)
    adapter = bank.add("a", method)
    stir(torch.nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "", by=0.01)
    bank.save("a", tmp_path / "a")
    bank.detach()
    model.name_or_path = ""  # what is in memory shall count, not the file that it came from
    for name in variants:
        change, says = VARIANTS[name]
        for key, parameter in model.named_parameters():
            value = first[key].detach()
            parameter.data = change(value) if value.dim() == 2 else value.to(change(torch.ones(32, 32)).dtype)
        bank = veneer.attach(model)
        if says == "note":
            (note,) = bank.load(tmp_path / "a").meta["notes"]
            assert name in note and "beyond rounding its weights are the same" in note
        else:
            with pytest.raises(CheckpointError, match=says):
                bank.load(tmp_path / "a")
            assert any("overridden" in note for note in bank.load(tmp_path / "a", force="base").meta["notes"])
        bank.detach()
