"""One answer to what a path means: ``bank.load``, training options and commands agree."""

from __future__ import annotations

import errno
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.checkpoints.helpers import make_folder
from tests.tiny import tiny

import veneer
from veneer.checkpoints import locate, read_adapter
from veneer.checkpoints.locate import adapter_of_job, adapters_at, choice_note, find_adapter, trained_format
from veneer.cli._parents import parse_mix
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


def test_a_path_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without permission is not one without an adapter; a text that cannot be a path is."""
    assert adapters_at(Path("a" * 5000)) == adapters_at(Path("a\0b")) == {}

    def refused(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(locate, "is_adapter", refused)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied; check its permissions"):
        find_adapter(tmp_path)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the files of org/sql in an empty hub cache, offline."""
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--org--sql"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (repo / "snapshots").mkdir()
    return repo / "snapshots" / ("0" * 40)


def test_a_hub_id_means_the_adapter_in_the_local_cache(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the name of its repository, to every reader; what is on this disk under the same name goes first."""
    make_folder(cached)
    path = Path("org/sql")
    assert adapters_at(path) == adapter_folders("org/sql") == {"sql": cached} and find_adapter(path) == ("sql", cached)
    bank = veneer.attach(tiny("llama"))
    assert bank.load("org/sql").name == "sql" and read_adapter(path).meta["path"] == str(cached)
    assert adapter_folders("mine=org/sql") == {"mine": cached}
    assert parse_mix(["org/sql:0.5"]) == [(cached, "sql", 0.5)]
    monkeypatch.chdir(cached.parent)
    make_folder(Path("org/sql"))
    assert adapters_at(path) == {"sql": path}
    (cached.parents[2] / "models--org--sqk").symlink_to(cached.parents[1])
    with pytest.raises(CheckpointError, match=r"^org/sqk holds no adapter"):  # a misspelt folder is not looked up
        find_adapter(Path("org/sqk"))


@pytest.mark.parametrize("name", ["config.json", "adapter_model.bin", "README.md"])
def test_a_hub_id_may_mean_no_adapter(name: str, cached: Path) -> None:
    """A base, a repository of something else and one that is not in the cache: the message has the remedy."""
    cached.mkdir()
    (cached / name).write_text("{}")
    for path in (Path("org/sql"), Path("org/other")):
        assert adapters_at(path) == {} and adapter_folders(str(path)) == {}
        for read in (find_adapter, veneer.attach(tiny("llama")).load, read_adapter):
            with pytest.raises(CheckpointError, match=rf"HF_HUB_OFFLINE is set.* hf download {path} --local-dir"):
                read(path)


@pytest.mark.parametrize(
    ("file", "says"), [("adapters.safetensors", "veneer import"), ("adapter_model.bin", "adapter_model")]
)
def test_another_format_on_the_hub_is_told(file: str, says: str, cached: Path) -> None:
    """An adapter of mlx-lm is to be imported; a pickle is not read."""
    cached.mkdir()
    (cached / "adapter_config.json").write_text("{}")
    (cached / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=says):
        veneer.attach(tiny("llama")).load("org/sql")


def test_an_adapter_is_downloaded_without_pickles(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only settings, safetensors and templates are asked for; a hub that cannot be reached, or refuses, gives none."""
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        if name == "org/sql":
            return str(make_folder(cached))
        raise {
            "org/gone": OSError("no"),
            "org/odd": ValueError("no"),
            "org/full": OSError(errno.ENOSPC, "No space left on device"),
        }[name]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert adapters_at(Path("org/sql")) == {"sql": cached}
    patterns = asked[0][1]["allow_patterns"]
    assert "adapter_model.safetensors" in patterns and not any(fnmatch("adapter_model.bin", one) for one in patterns)
    for name in ("org/gone", "org/odd"):
        with pytest.raises(CheckpointError, match=r"gives out no adapter of that name; check the spelling"):
            find_adapter(Path(name))
    with pytest.raises(CheckpointError, match="into the hub cache: No space left on device; free some space"):
        find_adapter(Path("org/full"))


@pytest.mark.parametrize(
    ("trained", "format"),
    [
        ([("nf4", "float32")], "nf4"),
        ([("nf4",), ("nf4", "bfloat16")], "nf4"),
        ([("nf4",), ("float32",)], None),
        ([("nf4",), ("int8",)], None),
        ([("nf4", "int8")], None),
        ([()], None),
    ],
)
def test_the_format_of_a_base_is_that_of_all_adapters(trained: list[tuple[str, ...]], format: str | None) -> None:
    """Plain layers of a quantized base, as its head, do not count; adapters of different bases have no common format."""
    receipts = [{"base": {str(i): {"dtype": dtype} for i, dtype in enumerate(each)}} for each in trained]
    assert trained_format(receipts) == format
    assert trained_format([{}, {"base": 3}, {"base": {"a": None}}]) is None
