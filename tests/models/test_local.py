"""The bases on this machine: the embedded one, and models of the Hub's cache by their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from veneer.cli.main import main
from veneer.models import local


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with a model, an adapter and a data set."""
    for kind, name in (("models", "some--model"), ("models", "some--adapter"), ("datasets", "some--rows")):
        folder = tmp_path / f"{kind}--{name}" / "snapshots" / ("a" * 40)
        folder.mkdir(parents=True)
        (folder / ("adapter_config.json" if "adapter" in name else "config.json")).write_text(
            json.dumps({"model_type": "qwen3"}), encoding="utf-8"
        )
        save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, str(folder / "model.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("cache")
def test_models_of_the_cache_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is listed with its weights; the adapter and the data set are not."""
    bases = list(local.local_bases())
    found = {base.name: base for base in bases if base.source == "hub cache"}
    assert list(found) == ["some/model"]
    assert (found["some/model"].weights, found["some/model"].model_type) == (22, "qwen3")
    monkeypatch.setattr(local, "local_bases", lambda: iter(bases))  # reading the embedded file takes a second
    assert main(["models"]) == 0
    assert "some/model" in capsys.readouterr().out


def test_an_absent_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache folder there are only the embedded bases."""
    monkeypatch.setattr(local, "EMBEDDED", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "absent"))
    assert list(local.local_bases()) == []
