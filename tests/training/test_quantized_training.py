"""Runs on quantized bases: several jobs beside each other, resuming, and what the run leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import QUIET, digest, options, write_rows

from veneer.checkpoints import attach, read_adapter
from veneer.checkpoints.receipt import receipt_of, recorded_base
from veneer.errors import ConfigError
from veneer.models.load import Base, load_base
from veneer.training import train

JOBS = (
    {"name": "lora", "r": 2, "lora_dropout": 0.2, "seed": 1, "modules_to_save": ("lm_head",)},
    {"name": "dora", "method": "dora", "r": 3, "lora_dropout": 0.0, "learning_rate": 5e-3},
)


def in_nf4(place: Path) -> Base:
    return load_base(place / "base", dtype="float32", quantize="nf4")


def state(base: Base) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.model.state_dict().items()}


def test_jobs_on_a_quantized_base_resume_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    """Two jobs on NF4, stopped and gone on with, end with the bits of a run that was never stopped; the base keeps its own."""
    base = in_nf4(place)
    before = state(base)
    shared: dict[str, Any] = {"jobs": JOBS, "steps": 6, "quantize": "nf4"}
    train(options(place, tmp_path / "whole", **shared), console=QUIET, base=base)
    train(options(place, tmp_path / "parts", **{**shared, "steps": 3}), console=QUIET, base=base)
    train(options(place, tmp_path / "parts", **shared), console=QUIET, base=base)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    after = state(base)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_calibrates_its_base_once(place: Path, tmp_path: Path) -> None:
    """With ``calibrate`` the run's folder has the quantized base, on which the run resumes to the same bits; the adapter names it."""
    shared: dict[str, Any] = {"jobs": JOBS, "quantize": "nf4", "calibrate": True}
    train(options(place, tmp_path / "whole", **shared, steps=2), console=QUIET)
    train(options(place, tmp_path / "parts", **shared, steps=1), console=QUIET)
    weights = tmp_path / "parts" / "base" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    result = train(options(place, tmp_path / "parts", **shared, steps=2), console=QUIET)
    digests = [digest(tmp_path / name) for name in ("parts", "whole")]
    files = [{name: value for name, value in one.items() if not name.endswith(".json")} for one in digests]
    assert files[0] == files[1] and len(files[0]) >= 2 and weights.stat().st_mtime_ns == written
    adapter = read_adapter(result.jobs["lora"].adapter)
    assert recorded_base(adapter) == str(tmp_path / "parts" / "base")
    assert receipt_of(adapter)["calibration"]["examples"] == 37
    plain, own = in_nf4(place), load_base(tmp_path / "parts" / "base", dtype="float32")
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(*(one.model.get_submodule(name).quantized.packed for one in (plain, own)))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "calibrate chooses the values of a quantized base"),
        ({"quantize": "nf4", "processes": 2}, "calibrate runs in one process"),
        ({"quantize": "nf4", "task": "classification"}, "a job trains a head"),
    ],
)
def test_calibration_that_a_run_cannot_do(place: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    """A plain base, several processes and heads are refused."""
    with pytest.raises(ConfigError, match=said):
        train(options(place, tmp_path / "run", calibrate=True, **more), console=QUIET)
    assert not (tmp_path / "run" / "base").exists()


def test_a_job_beside_another_ends_as_it_would_alone(place: Path, tmp_path: Path) -> None:
    """On NF4, a DoRA job that shares passes with a LoRA job has the held-out losses of its run alone, within 1e-4."""
    base = in_nf4(place)
    shared: dict[str, Any] = {"steps": 6, "eval_every": 3, "valid": (place / "valid.jsonl",), "quantize": "nf4"}
    losses = []
    for jobs in (JOBS, JOBS[1:]):
        out = tmp_path / str(len(jobs))
        result = train(options(place, out, jobs=jobs, tokens_per_shared_pass=512, **shared), console=QUIET, base=base)
        losses.append([loss for _, loss in result.jobs["dora"].losses])
    assert losses[0][-1] < losses[0][0] - 0.01
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_run_on_quantized_experts(tmp_path: Path) -> None:
    """A mixture in NF4 is trained on and evaluated; the receipt has its format, and the plain base is told apart from it."""
    model = tiny("mixtral", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", 9)
    result = train(options(tmp_path, tmp_path / "run", method="dora", steps=3, quantize="nf4"), console=QUIET)
    record = receipt_of(read_adapter(result.adapter))["base"]["model.layers.0.mlp.experts.1.up_proj"]
    assert record["dtype"] == "nf4"
    for format, differs in (("nf4", False), (None, True)):
        bank = attach(load_base(tmp_path / "base", dtype="float32", quantize=format).model)
        notes = bank.load(str(result.adapter)).meta["notes"]
        assert any("the base is in float32 here and was in nf4" in note for note in notes) == differs
