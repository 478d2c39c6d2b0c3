"""Folders on the embedded model: saved, read back by Veneer and by PEFT, with the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.helpers import load_peft, stir

import veneer
from veneer import DoRA, LoRA

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
    theirs = load_peft(veneer.load_base("smollm2-135m", dtype="float32").model, tmp_path / "a")
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - expected).abs().max() <= 1e-4
