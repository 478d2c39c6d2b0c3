"""One answer to what a path means: ``bank.load``, training options and commands agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.checkpoints.helpers import make_folder
from tests.tiny import tiny

import veneer
from veneer.checkpoints import read_adapter
from veneer.checkpoints.locate import adapter_of_job, adapters_at, choice_note, find_adapter
from veneer.cli._targets import adapter_folders
from veneer.errors import CheckpointError


def run(folder: Path, *adapters: str) -> Path:
    """The folder of a run with these adapters."""
    for adapter in adapters:
        make_folder(folder / adapter)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("base: x\n")
    return folder


@pytest.mark.parametrize(
    ("path", "name", "folder"),
    [
        ("out", "out", "out"),
        ("out/adapter_model.safetensors", "out", "out"),
        ("one", "one", "one/adapter"),
        ("one/adapter", "one", "one/adapter"),
        ("one/best", "one", "one/best"),
        ("two/adapters/b", "b", "two/adapters/b"),
        ("two/best/a", "a", "two/best/a"),
    ],
)
def test_a_path_means_one_adapter(tmp_path: Path, path: str, name: str, folder: str) -> None:
    """Folders, files and runs give the same name and folder to every reader, and load."""
    make_folder(tmp_path / "out")
    run(tmp_path / "one", "adapter", "best")
    run(tmp_path / "two", "adapters/a", "adapters/b", "best/a", "best/b")
    assert find_adapter(tmp_path / path) == (name, tmp_path / folder)
    assert adapter_folders(str(tmp_path / path)) == {name: tmp_path / folder}
    bank = veneer.attach(tiny("llama"))
    assert bank.load(tmp_path / path).name == name
    assert read_adapter(tmp_path / path).meta["path"] == str(tmp_path / folder)


def test_a_path_may_mean_several(tmp_path: Path) -> None:
    """A run of several jobs, and a folder of folders, give each adapter under its own name; a reader of one refuses them."""
    two = run(tmp_path / "two", "adapters/a", "adapters/b", "best/a", "best/b")
    for path, inside in ((two, "adapters"), (two / "best", "best"), (two / "adapters", "adapters")):
        assert adapters_at(path) == {name: two / inside / name for name in ("a", "b")}
        for read in (find_adapter, veneer.attach(tiny("llama")).load):
            with pytest.raises(
                CheckpointError, match=r"holds several adapters \(a, b\); give the folder of one, such as"
            ):
                read(path)
    assert adapter_of_job(two, "b") == two / "adapters" / "b" and adapter_of_job(two, "c") is None


@pytest.mark.parametrize(
    ("inside", "named"),
    [
        (("sql", "style"), r"holds several adapters \(sql, style\); give the folder of one, such as .*sql"),
        (("checkpoint-10", "checkpoint-20"), r"holds several adapters \(checkpoint-10, checkpoint-20\)"),
        (("job/checkpoint-3", "other/checkpoint-4"), r"contains job, other: give one, such as .*job"),
        (("epoch_0/adapter",), r"contains epoch_0: give one, such as .*epoch_0"),
        (("checkpoint-20",), ""),
        ((".", "checkpoint-20"), ""),
    ],
    ids=["peft", "trainer", "nested", "torchtune", "one checkpoint", "beside its checkpoints"],
)
def test_folders_above_adapters(inside: tuple[str, ...], named: str, tmp_path: Path) -> None:
    """The folders that other programs leave mean their one adapter, or name those inside to ``bank.load`` and every command."""
    for path in inside:
        (tmp_path / "out" / path).mkdir(parents=True, exist_ok=True)
        make_folder(tmp_path / "out" / path)
    bank = veneer.attach(tiny("llama"))
    if not named:
        assert find_adapter(tmp_path / "out")[1] == tmp_path / "out" / inside[0]
        assert bank.load(tmp_path / "out", name="a").meta["path"] == str(tmp_path / "out" / inside[0])
        return
    for read in (bank.load, find_adapter):
        with pytest.raises(CheckpointError, match=named):
            read(tmp_path / "out")
    if not adapters_at(tmp_path / "out"):
        with pytest.raises(CheckpointError, match=named):
            adapter_folders(str(tmp_path / "out"))


def test_a_path_may_mean_none(tmp_path: Path) -> None:
    """A run before its first adapter, a base and a missing folder hold none, and loading says why."""
    run(tmp_path / "new", "best/a")
    (tmp_path / "model" / "extra").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    make_folder(tmp_path / "model" / "extra")
    for name, says in (("new", "contains best: give one"), ("model", "holds a base model"), ("gone", "does not exist")):
        assert adapters_at(tmp_path / name) == {}
        with pytest.raises(CheckpointError, match="holds no adapter"):
            find_adapter(tmp_path / name)
        with pytest.raises(CheckpointError, match=says):
            veneer.attach(tiny("llama")).load(tmp_path / name)


def receipt(folder: Path, **entries: Any) -> Path:
    """A PEFT folder whose receipt has these entries."""
    make_folder(folder)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "veneer": json.dumps(entries)})
    return folder


@pytest.mark.parametrize(
    ("best", "last", "taken"),
    [
        ({"steps": 4, "held_out_loss": 0.5}, {"steps": 9, "held_out_loss": 0.6}, "best"),
        ({"steps": 4, "held_out_loss": 0.5}, {"steps": 9, "held_out_loss": None}, "best"),
        ({"steps": 4, "held_out_loss": 0.6}, {"steps": 9, "held_out_loss": 0.5}, "adapter"),
        ({"steps": 9, "held_out_loss": 0.5}, {"steps": 9, "held_out_loss": 0.5}, "adapter"),
        ({"steps": 4, "held_out_loss": "0.5"}, {"steps": 9, "held_out_loss": 0.6}, "adapter"),
        ({}, {"steps": 9, "held_out_loss": 0.6}, "adapter"),
    ],
)
def test_a_run_means_its_best_adapter(tmp_path: Path, best: dict[str, Any], last: dict[str, Any], taken: str) -> None:
    """The one with the lower held-out loss, of one job and of several, and commands say so; a folder means itself."""
    one, two = run(tmp_path / "one"), run(tmp_path / "two")
    receipt(one / "best", **best)
    receipt(one / "adapter", **last)
    receipt(two / "best" / "a", **best)
    receipt(two / "adapters" / "a", **last)
    assert find_adapter(one) == ("one", one / taken) and adapter_of_job(one, "one") == one / taken
    inside = {"best": two / "best" / "a", "adapter": two / "adapters" / "a"}[taken]
    assert adapters_at(two) == {"a": inside} and adapter_of_job(two, "a") == inside
    note = choice_note(one, find_adapter(one)[1])
    assert (note is not None) == (taken == "best") == (choice_note(two, inside) is not None)
    if note is not None:
        assert "step 4 with a held-out loss of 0.5000" in note and str(one / "adapter") in note
    for folder in (one / "best", one / "adapter"):
        assert find_adapter(folder)[1] == folder and choice_note(folder, folder) is None


def test_a_damaged_best_adapter_is_not_taken(tmp_path: Path) -> None:
    """A file that cannot be read says nothing of its loss."""
    one = run(tmp_path / "one", "best")
    receipt(one / "adapter", steps=9, held_out_loss=0.6)
    for content in (b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x10\0\0\0\0\0\0\0{"):
        (one / "best" / "adapter_model.safetensors").write_bytes(content)
        assert find_adapter(one)[1] == one / "adapter"
