"""Checkpoints that a disk has damaged: the one before is taken, with a word about it, and never a silent start from the beginning."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tests.training.made import QUIET, digest, options

from veneer.errors import CheckpointError
from veneer.models.load import Base
from veneer.training import train
from veneer.training.run.console import Console


def flip(folder: Path) -> None:
    """Damage a checkpoint by one bit."""
    file = folder / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def folders(out: Path) -> list[Path]:
    return sorted(path for path in (out / "checkpoints").iterdir() if path.is_dir())


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(place: Path, base: Base, tmp_path: Path) -> None:
    """The run says which checkpoint is damaged, goes on from the one before, and ends with the bits that it had."""
    wanted = options(place, tmp_path / "a")
    train(wanted, base=base, console=QUIET)
    good = digest(tmp_path / "a")
    newest = folders(tmp_path / "a")[-1]
    flip(newest)
    said = io.StringIO()
    train(wanted, base=base, console=Console(said))
    assert f"{newest.name} of {tmp_path / 'a'} is damaged; resuming from the one before" in said.getvalue()
    assert "checkpoints_damaged" in (tmp_path / "a" / "events.jsonl").read_text()
    assert digest(tmp_path / "a") == good


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(place: Path, base: Base, tmp_path: Path) -> None:
    """Nothing of what is left is overwritten: the error says what can be done."""
    wanted = options(place, tmp_path / "a")
    train(wanted, base=base, console=QUIET)
    for folder in folders(tmp_path / "a"):
        flip(folder)
    figures = (tmp_path / "a" / "metrics" / "a.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints are damaged.*--fresh"):
        train(wanted, base=base, console=QUIET)
    assert (tmp_path / "a" / "metrics" / "a.jsonl").read_bytes() == figures
    train(wanted, base=base, console=QUIET, fresh=True)


def test_a_named_checkpoint_that_is_damaged_is_refused(place: Path, base: Base, tmp_path: Path) -> None:
    """Who asks for one checkpoint gets that one or an error."""
    wanted = options(place, tmp_path / "a")
    train(wanted, base=base, console=QUIET)
    first = folders(tmp_path / "a")[0]
    flip(first)
    with pytest.raises(CheckpointError, match=f"{first.name} is damaged"):
        train(wanted, base=base, console=QUIET, resume_from=first.name)
