"""Names of bases in files that others read: Hub ids, never the path of a cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import tiny

from veneer import LoRA, attach
from veneer.cli._targets import base_named_in
from veneer.models.embedded import EMBEDDED, alias_of, public_name

HUB_ID = EMBEDDED["smollm2-135m"].hub_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m", HUB_ID),
        ("SmolLM2-135M", HUB_ID),
        ("cache/veneer/bases/smollm2-135m-0a1b2c3d", HUB_ID),
        ("cache/huggingface/hub/models--some--model/snapshots/0a1b", "some/model"),
        ("cache/huggingface/hub/models--some--model--v2/snapshots/0a1b/", "some/model--v2"),
        ("some/model", "some/model"),
        ("./base", "./base"),
        ("data/bases/other-0a1b", "data/bases/other-0a1b"),
    ],
)
def test_a_public_name_is_a_hub_id_where_there_is_one(name: str, expected: str) -> None:
    """Embedded bases and snapshots of the Hub's cache have their Hub id; other names stay."""
    assert public_name(name) == expected


@pytest.mark.parametrize(
    ("name", "written", "loaded"),
    [
        ("smollm2-135m", HUB_ID, "smollm2-135m"),
        ("some/model", "some/model", "some/model"),
        ("/x/hub/models--some--model/snapshots/0a1b", "some/model", "some/model"),
    ],
)
def test_folders_name_the_hub_id_and_load_the_same_base(name: str, written: str, loaded: str, tmp_path: Path) -> None:
    """The config and the card name the Hub id; commands load the embedded base that the receipt records."""
    bank = attach(tiny("llama"))
    bank.add("a", LoRA(r=2))
    bank.save("a", tmp_path / "a", base_name=name)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert config["base_model_name_or_path"] == written
    assert f'base_model: "{written}"' in card and "snapshots" not in card
    assert base_named_in(tmp_path / "a") == loaded
    assert alias_of(loaded) == ("smollm2-135m" if loaded == "smollm2-135m" else None)

    again = attach(tiny("llama"))
    again.load(tmp_path / "a", name="b")
    again.save("b", tmp_path / "b")
    assert base_named_in(tmp_path / "b") == loaded
