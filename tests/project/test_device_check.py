"""The checks of a device run on the CPU on the smallest sizes, so that they work on the day when there is a device."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.device import correctness
from bench.device.__main__ import STAGES
from bench.device.supervise import Setting, Stage, check, sound, supervise, table
from tests.project.source import ROOT

from veneer.kernels.lora.single import SingleBranch

LEAST = {
    "correctness": 11,
    "qwen": 5,
    "llama": 7,
    "together": 1,
    "decoding": 4,
    "sweeps": 3,
    "profile": 5,
    "ceilings": 3,
}
"""Rows of each stage, at least."""


def setting(tmp_path: Path, seconds: float = 60) -> Setting:
    return Setting("cpu", True, seconds, tmp_path)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_runs(stage: Stage, tmp_path: Path) -> None:
    """Each stage yields its rows, its checks hold, and no other program failed."""
    rows = list(importlib.import_module(stage.module).run(setting(tmp_path)))
    assert len(rows) >= LEAST[stage.name]
    assert [row for row in rows if not row.get("ok", True) or "Error" in str(row["value"])] == []


def test_a_stage_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """It costs its own time limit, and what it found stays; a stage that raises says what."""
    processes = multiprocessing.get_context("spawn")
    endless = Stage("endless", "tests.project.endless_stage", 1.5)
    broken = Stage("broken", "tests.project.no_such_module", 60)
    results: dict[str, Any] = {
        one.name: supervise(one, setting(tmp_path, one.seconds), processes) for one in (endless, broken)
    }
    assert results["endless"]["state"] == "stopped" and "over its limit of 1.5 s" in results["endless"]["error"]
    assert [row["what"] for row in results["endless"]["rows"]] == ["first"]
    assert results["broken"]["state"] == "failed" and "no_such_module" in results["broken"]["error"]
    assert not sound(results) and "**stopped**" in table(results)


def test_a_value_above_its_bound_fails(tmp_path: Path) -> None:
    """A check that does not hold is marked in the table and fails the whole."""
    good, bad = check("one", 1.0, 2.0), check("two", float("nan"), 2.0)
    assert sound({"a": {"state": "done", "rows": [good]}}) and not sound({"a": {"state": "done", "rows": [good, bad]}})
    assert "**too large**" in table({"a": {"state": "done", "rows": [bad]}})


def test_correctness_finds_a_wrong_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast form with another scale exceeds its bound."""
    monkeypatch.setattr(correctness, "_TINY_CASES", ("LoRA",))
    right = SingleBranch._b_gradient
    monkeypatch.setattr(SingleBranch, "_b_gradient", lambda *args: right(*args) * 1.001)
    row = next(iter(correctness.run(setting(tmp_path))))
    assert not row["ok"] and 1e-4 < row["value"] < 1e-2


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """All stages in processes of their own: JSON for each, and a table."""
    line = [sys.executable, "-m", "bench.device", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {stage.name: json.loads((tmp_path / f"{stage.name}.json").read_text())["state"] for stage in STAGES}
    assert set(states.values()) == {"done"}
    assert (tmp_path / "table.md").read_text().count("\n") > 40
