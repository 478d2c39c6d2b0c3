"""Methods beyond low rank as jobs of one run: they train beside each other, resume to the bit, and are saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.checkpoints.helpers import outputs
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import QUIET, digest, options, write_rows
from tests.training.test_run import stop_after

import veneer
from veneer.models.load import load_base
from veneer.training import train


def test_methods_train_beside_each_other_and_resume(tmp_path: Path) -> None:
    """Six methods on one base: a stopped run ends with the bits of a whole one, each adapter moved, and each file is read."""
    tiny("opt").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", 37)
    jobs = [
        {"name": "lora"},
        {"name": "bitfit", "method": "bitfit"},
        {"name": "ia3", "method": "ia3"},
        {"name": "houlsby", "method": "houlsby", "bottleneck_size": 4},
        {"name": "pfeiffer", "method": "pfeiffer", "bottleneck_size": 4, "layers_to_transform": (1,)},
        {"name": "vera", "method": "vera", "vera_rank": 8},
    ]
    wanted = {"jobs": jobs, "steps": 8}
    result = train(options(tmp_path, tmp_path / "a", **wanted), console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path, tmp_path / "b" / "a", **wanted), console=stop_after(5))
    train(options(tmp_path, tmp_path / "b" / "a", **wanted), console=QUIET)
    assert digest(tmp_path / "a") == digest(tmp_path / "b" / "a")
    base = load_base(tmp_path / "base", dtype="float32")
    bank = veneer.attach(base.model)
    before = outputs(base.model)
    for job in jobs:
        name = str(job["name"])
        bank.load(result.jobs[name].adapter, name=name)
        assert bank[name].method.name == job.get("method", "lora")
        with bank.use(name):
            assert not torch.equal(outputs(base.model), before)
