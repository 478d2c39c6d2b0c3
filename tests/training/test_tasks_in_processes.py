"""Every kind of run in several processes: it ends as in one, or is refused before anything starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.made import QUIET, figures, options
from tests.training.processes import Forks

from veneer.training import train

LABELLED = [{"text": f"{a} and {a + 1}", "label": ("no", "yes", "maybe")[a % 3]} for a in range(17)]
PAIRS = [{"prompt": f"{a}+1", "chosen": f"{a + 1}", "rejected": f"{a - 1}{a}"} for a in range(17)]
CASES: dict[str, dict[str, Any]] = {
    "three": {"processes": 3, "batch_size": 5},
    "classification": {"task": "classification", "rows": LABELLED, "seed": 3},
    "dpo": {"task": "dpo", "rows": PAIRS},
    "kto": {
        "task": "kto",
        "rows": [
            {**{k: r[k] for k in ("prompt",)}, "completion": r["chosen"], "label": i % 2 == 0}
            for i, r in enumerate(PAIRS)
        ],
    },
    "prefix": {"method": "prefix", "r": None, "lora_dropout": None},
    "prompt": {"method": "prompt", "r": None, "lora_dropout": None},
    "full": {"method": "full", "r": None, "lora_dropout": None},
    "nf4": {"quantize": "nf4", "method": "dora"},
    "one row held out": {"held": 1},
}


def start(size: int, wanted: dict[str, Any]) -> Forks:
    """Start a run in so many processes."""

    def work(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        train(wanted, console=QUIET)

    return Forks(size, work)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_kinds_of_runs(place: Path, tmp_path: Path, name: str) -> None:
    """The losses, evaluations and tensors of several processes are those of one, to rounding."""
    case = dict(CASES[name])
    rows, size, held = case.pop("rows", None), case.pop("processes", 2), case.pop("held", 5)
    train_on, valid = place / "train.jsonl", tmp_path / "valid.jsonl"
    if rows is not None:
        train_on = tmp_path / "train.jsonl"
        train_on.write_text("".join(json.dumps(row) + "\n" for row in rows))
    valid.write_text("".join(f"{line}\n" for line in train_on.read_text().splitlines()[:held]))
    more = {
        "batch_size": 4,
        "tokens_per_pass": 60,
        "eval_every": 2,
        "steps": 4,
        "save_every": 2,
        "optimizer": "sgd",
        **case,
    }
    wanted = {**options(place, tmp_path / "one", valid=(valid,), device="cpu"), "data": (train_on,), **more}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    for count, out in ((1, "one"), (size, "several")):
        forks = start(count, {**wanted, "out": tmp_path / out})
        assert forks.wait(200) == [0] * count, forks.errors()
    one, several = (figures(next((tmp_path / out / "metrics").iterdir())) for out in ("one", "several"))
    assert len(one) == len(several) > 4
    for line, other in zip(one, several, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            assert other[key] == (pytest.approx(value, rel=2e-5, abs=2e-6) if isinstance(value, float) else value), (
                key,
                line,
                other,
            )
    files = [sorted((tmp_path / out).rglob("adapter_model.safetensors")) for out in ("one", "several")]
    assert files[0] and len(files[0]) == len(files[1])
    for mine, other_file in zip(*files, strict=True):
        tensors, others = load_file(mine), load_file(other_file)
        assert tensors.keys() == others.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(others[key], value, rtol=1e-4, atol=1e-6)
