"""The method that the documentation adds: its code runs, in a mixed batch, merged, saved and read."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from tests.adapters.made import merged_model, nudge
from tests.checkpoints.helpers import inputs, outputs
from tests.tiny import tiny

from veneer.adapters import methods

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "methods.md"


def test_the_method_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSF is at first the base to the bit; trained, it is its merged model; a row of it is the same alone and beside LoRA."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "page.py").write_text("\n\n".join(blocks), encoding="utf-8")
    found = runpy.run_path(str(tmp_path / "page.py"))
    model = tiny("opt")
    base = outputs(model)
    two = {key: value.repeat(2, 1)[:2] for key, value in inputs(model).items()}
    bank = found["try_out"](model, **two)
    with bank.use("ssf"):
        assert torch.equal(outputs(model), base)
    nudge(bank["ssf"])
    with bank.use("ssf"), torch.no_grad():
        alone = model(**two).logits[0]
        expected = outputs(model)
    with bank.use(["ssf", "lora"]), torch.no_grad():
        assert (model(**two).logits[0] - alone).abs().max() <= 2e-6
    assert (outputs(merged_model(bank, "ssf")) - expected).abs().max() <= 1e-5
    assert (expected - base).abs().max() > 0.1
    assert "SSF" not in {method.peft_type for method in methods.METHODS.values()}
