"""Files and folders that commands write have the modes that the user's umask gives."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.training.made import write_place

from veneer.checkpoints.tensors import save_tensors
from veneer.cli.main import main
from veneer.models.cache import build_once

TRAIN = (
    "train",
    "train.jsonl",
    "--base",
    "base",
    "--steps",
    "2",
    "--batch-size",
    "2",
    "--no-plan",
    "--compile",
    "false",
)


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=["022", "002", "077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set a umask for the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_modes_follow_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    """A run, an adapter, a merged model, a composition, an export, a card and a page are readable by whom the umask lets read them."""
    write_place(tmp_path)
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    for words in (
        (*TRAIN, "--valid", "valid.jsonl", "--out", "run"),
        ("merge", "run", "--out", "merged", "--no-probe"),
        ("compose", "run:0.5", "--out", "half"),
        ("export", "run", "--to", "peft", "--out", "peft"),
        ("export", "run", "--to", "gguf", "--out", "a.gguf"),
        ("export", "run", "--to", "card", "--out", "card.md"),
        ("inspect", "run", "--html", "page.html"),
        ("data", "show", "train.jsonl", "--base", "base", "--html", "rows.html"),
    ):
        assert main(words) == 0
    written = sorted(set(tmp_path.rglob("*")) - before)
    assert len(written) > 25
    modes = {
        str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in written
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert modes == {}


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_the_cache_follows_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    """Folders in the cache too, so that users who share one can read it."""
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    made = build_once("kind/key", lambda folder: save_tensors({"a": torch.ones(1)}, folder / "a.safetensors"))
    assert stat.S_IMODE(made.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((made / "a.safetensors").stat().st_mode) == 0o666 & ~umask
