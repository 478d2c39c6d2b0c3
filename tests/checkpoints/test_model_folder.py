"""Model folders: shards in and out, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from veneer.checkpoints import model_folder as merged
from veneer.checkpoints.model_folder import ModelFolder, ModelWriter, write_model
from veneer.errors import CheckpointError


@pytest.fixture
def base(tmp_path: Path) -> ModelFolder:
    """A folder of two tensors with what usually stands beside them."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text('{"model_type": "llama", "x": "é"}', encoding="utf-8")
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "modeling.py",
        "adapter_config.json",
        "weights.bin",
    ):
        (folder / name).write_text("{}")
    return ModelFolder(folder)


def test_what_describes_the_model_is_taken_over(base: ModelFolder, tmp_path: Path) -> None:
    """Tokenizer, template and licence are copied; code, other weights and adapters are not; the config is the new one."""
    with write_model(base, tmp_path / "new" / "out", {**base.config, "y": 1}) as writer:
        for key, tensor in base.tensors():
            writer.put(key, tensor)
    out = tmp_path / "new" / "out"
    names = {file.name for file in out.iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == {"model_type": "llama", "x": "é", "y": 1}
    again = ModelFolder(out)
    assert torch.equal(again.get("a"), base.get("a")) and again.shape("a") == (2, 3)
    assert again.dtypes() == {"F32", "BF16"}
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_a_failure_leaves_nothing(base: ModelFolder, tmp_path: Path) -> None:
    """An exception inside the context leaves neither the folder nor a part of it."""
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail() -> None:
        with write_model(base, tmp_path / "out", {}) as writer:
            writer.put("a", base.get("a"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_taken_place_is_refused(base: ModelFolder, tmp_path: Path) -> None:
    """A folder that holds something, or a file, is never written over; an empty folder is used."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name, says in (("full", "a folder that is not empty"), ("file", "a file")):
        with pytest.raises(CheckpointError, match=says), write_model(base, tmp_path / name, {}):
            raise AssertionError("must not be reached")
    (tmp_path / "empty").mkdir()
    with write_model(base, tmp_path / "empty", {}) as writer:
        writer.put("a", base.get("a"))
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_what_does_not_read_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that returns other bits is noticed; NaN reads back as NaN."""
    writer = ModelWriter(tmp_path, 100)
    writer.put("n", torch.tensor([float("nan"), -0.0]))
    writer.finish()

    def flip(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file({key: value + 1 for key, value in tensors.items()}, file, metadata)

    monkeypatch.setattr(merged, "save_tensors", flip)
    writer = ModelWriter(tmp_path, 100)
    writer.put("a", torch.zeros(3))
    with pytest.raises(CheckpointError, match="a does not read back"):
        writer.finish()


def test_damaged_folders_are_told(base: ModelFolder, tmp_path: Path) -> None:
    """A truncated file, a name in two files, an index that points at nothing or outside: one sentence each."""
    folder = base.path
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in both one\.safetensors and two\.safetensors"):
        ModelFolder(folder)
    (folder / "two.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match=r"two\.safetensors cannot be read"):
        ModelFolder(folder)
    for target in ("gone.safetensors", "../base/one.safetensors"):
        (folder / merged.INDEX).write_text(json.dumps({"weight_map": {"a": target}}))
        with pytest.raises(CheckpointError, match="which the folder lacks"):
            ModelFolder(folder)
    (folder / merged.INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        ModelFolder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        ModelFolder(folder)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors"):
        ModelFolder(tmp_path / "none")
