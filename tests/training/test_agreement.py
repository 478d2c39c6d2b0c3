"""Processes whose versions, base, examples or folder differ are refused in one sentence before the first step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.made import options
from tests.training.processes import Forks

from veneer.errors import ProcessError
from veneer.training import train
from veneer.training.parallel import agreement
from veneer.training.parallel.processes import Processes
from veneer.training.run.console import Console


def refused(by_rank: list[dict[str, Any]]) -> str:
    """What a run says whose processes have these options, and which must not begin."""
    forks = Forks(len(by_rank), lambda rank: str(train(by_rank[rank], console=Console(quiet=True))))
    codes = forks.wait(90)
    assert codes == [1] * len(by_rank), forks.errors()
    assert not any((wanted["out"] / "checkpoints").exists() for wanted in by_rank)
    return "".join(forks.errors())


def test_versions_and_folders_that_differ(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version, and another folder under the same name, are refused before the base is loaded."""
    wanted = {**options(place, tmp_path / "out"), "device": "cpu"}
    own = agreement.versions
    with monkeypatch.context() as patched:
        patched.setattr(agreement, "versions", lambda: {**own(), "torch": f"2.{os.environ['RANK']}"})
        said = refused([wanted, wanted])
    assert "process 1 runs torch 2.1 (2.0 in process 0), so they would not train alike" in said
    with monkeypatch.context() as patched:
        patched.setattr(agreement, "_SECONDS", 0.2)
        said = refused([wanted, {**wanted, "out": tmp_path / "local"}])
    assert "process 1 does not see" in said and "put --out on storage that all machines share" in said


def test_an_exchange_that_failed_is_told_by_where_it_failed() -> None:
    """Words such as "connection" in another error do not make it the loss of a process."""
    group = Processes(1, 2, 30.0)
    for error in (RuntimeError("no connection_proj in distributed"), ValueError("gloo")):
        assert str(error) in str(group.fault_of_pass(error))
    with pytest.raises(ValueError, match="process group") as raised:
        torch.distributed.all_reduce(torch.zeros(1))
    own = RuntimeError("Connection closed by peer").with_traceback(raised.value.__traceback__)
    for error in (own, torch.distributed.DistNetworkError("timed out")):
        assert "another process has ended, or did not answer for 30 s" in str(group.fault_of_pass(error))
    known = ProcessError("process 1 of 2: another process has ended")
    assert str(group.fault_of_pass(known)) == str(known)


@pytest.mark.slow
def test_bases_and_examples_that_differ(place: Path, tmp_path: Path) -> None:
    """Another base under the same name, and other examples, are refused before the first step."""
    wanted = {**options(place, tmp_path / "out"), "device": "cpu"}
    shutil.copytree(place / "base", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = {name: tensor * 1.5 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    said = refused([wanted, {**wanted, "base": str(tmp_path / "base")}])
    assert "process 1 has different base weights from process 0; give all processes the same files" in said
    (tmp_path / "rows.jsonl").write_text("".join((place / "train.jsonl").read_text().splitlines(True)[:9]))
    said = refused([wanted, {**wanted, "data": (tmp_path / "rows.jsonl",)}])
    assert "process 1 has different examples from process 0" in said
