"""Training on a mixture of experts: jobs together and alone, resuming, and what is said of experts without tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import tiny, tiny_tokenizer

import veneer
from veneer.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture whose router never chooses the last two of eight experts in its last block, and rows to train on."""
    folder = tmp_path_factory.mktemp("experts")
    model: Any = tiny("qwen3_moe", num_experts=8)
    router = model.model.layers[1].mlp.gate.weight.data
    router[1], router[3] = -router[0], -router[2]  # for any token two of these four are above zero
    router[6:] = 0
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = [{"text": "".join(chr(97 + (i * j) % 26) for j in range(20 + i))} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(base: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "base": str(base / "base"),
        "data": [str(base / "rows.jsonl")],
        "out": str(out),
        "steps": 4,
        "eval_every": 4,
        "batch_size": 2,
        "dtype": "float32",
        "compile": False,
        "valid_fraction": 0.2,
        **more,
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_jobs_on_experts_end_as_alone_and_resume(base: Path, tmp_path: Path) -> None:
    """LoRA and DoRA jobs on experts in one pass end as each alone; going on from a checkpoint ends with the same bits and counts."""
    jobs = [{"name": "l", "r": 4}, {"name": "d", "r": 8, "method": "dora"}]
    both = veneer.train(options(base, tmp_path / "both", jobs=jobs, save_every=2))
    alone = veneer.train(options(base, tmp_path / "alone", r=8, method="dora"))
    found, expected = tensors(both.jobs["d"].adapter), tensors(alone.adapter)
    assert found.keys() == expected.keys() and any("experts" in name for name in found)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-4), name
    names = {name: tensors(both.jobs[name].adapter) for name in ("l", "d")}
    counts = json.loads((tmp_path / "both" / "checkpoints" / "step-00000004" / "state.json").read_text())["jobs"]
    again = veneer.train(options(base, tmp_path / "both", jobs=jobs, save_every=2), resume_from="step-00000002")
    for name, before in names.items():
        after = tensors(again.jobs[name].adapter)
        assert all(torch.equal(after[key], before[key]) for key in before)
    redone = json.loads((tmp_path / "both" / "checkpoints" / "step-00000004" / "state.json").read_text())["jobs"]
    assert all(redone[name]["expert_tokens"] == counts[name]["expert_tokens"] for name in names)
    assert sum(counts["l"]["expert_tokens"]["model.layers.0.mlp.experts"]) > 100


def test_experts_without_tokens_are_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run ends with the experts that no token was routed to; the receipt, inspect and its page have the tokens of each."""
    words = [str(base / "rows.jsonl"), "--base", str(base / "base"), "--out", str(tmp_path / "run"), "--steps", "4"]
    assert main(["train", *words, "--dtype", "float32", "--compile", "false"]) == 0
    told = capsys.readouterr().out
    assert "no token of the examples was routed to" in told and "layers.1.mlp.experts.6" in told
    assert main(["inspect", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "16 experts, trained on 0 to" in told and "no token reached" in told
    page = tmp_path / "page.html"
    assert main(["inspect", str(tmp_path / "run"), "--html", str(page)]) == 0
    text = page.read_text()
    assert "Experts: 16, trained on 0 to" in text and "mlp.experts.*.up_proj" in text
    assert "norm of each expert" in text and "tokens in training" in text
