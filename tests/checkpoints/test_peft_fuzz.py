"""Valid files with wrong meaning: values in the header, the settings and the receipt replaced by others of every JSON kind."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.helpers import file_bytes, outputs, read_file, stir
from tests.tiny import tiny
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.checkpoints import read_adapter
from veneer.checkpoints.inspect import view
from veneer.errors import CheckpointError

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, 2**63, 2**200, "", "x", "q_proj", "(a+)+$", "\x00", "\u202e", "LORA", "pissa",
    "all-linear", [], [[]], [None], [0], [4, 5], ["q_proj"], ["lm_head"], [1.5], {}, {"a": 1}, {"q_proj": 3}, {"q_proj": None}, {"": 0},
    [[[[[]]]]], "x" * 10_000, list(range(1000)), ["F32"], "F32", "BF16", {"dtype": []}, {"sketch": [1] * 8}, [1] * 8, ["1"] * 8,
]  # fmt: skip


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where anything stands in a JSON value."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(spot for key, child in below for spot in spots(child, (*path, key)))]


def changed(value: Any, rng: random.Random) -> Any:
    """A copy with one spot replaced, removed, or given another name."""
    copy = json.loads(json.dumps(value))
    *way, last = rng.choice(spots(copy)[1:])
    parent = copy
    for key in way:
        parent = parent[key]
    kind = rng.randrange(5)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(rng.choice(ODD))[:50]] = parent.pop(last)
    elif kind == 2 and isinstance(parent, dict):
        parent[rng.choice(["lora_bias", "bias", "modules_to_save", "use_dora", "extra", *parent])] = rng.choice(ODD)
    else:
        parent[last] = rng.choice(ODD)
    return copy


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything in it: a magnitude, a head and rows of its own, a receipt."""
    folder = tmp_path_factory.mktemp("source")
    bank = veneer.attach(base_model())
    method = DoRA(
        r=2, target_modules=("q_proj", "v_proj"), modules_to_save=("lm_head",), trainable_token_indices=(5, 6)
    )
    adapter = bank.add("a", method)
    stir(nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "")
    bank.save("a", folder, logits=True)
    return folder


def base_model() -> Any:
    return tiny("llama", num_hidden_layers=1, tie_word_embeddings=False)


@pytest.mark.parametrize("part", ["settings", "header", "receipt"])
@pytest.mark.parametrize("count", [250, pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_odd_values_are_refused_or_equal_in_effect(count: int, part: str, source: Path, tmp_path: Path) -> None:
    """Replacements in each part: our refusal, or an adapter that computes the same; without a model, our refusal or an adapter."""
    header, data = read_file(source / "adapter_model.safetensors")
    settings = json.loads((source / "adapter_config.json").read_text())
    receipt = json.loads(header["__metadata__"]["veneer"])
    bank = veneer.attach(base_model())
    bank.load(source, name="original")
    with bank.use("original"):
        expected = outputs(bank.model)
    plain = outputs(bank.model)
    rng = random.Random(part)
    loaded = refused = 0
    for _ in range(count):
        parts = {"settings": settings, "header": header, "receipt": receipt}
        parts[part] = changed(parts[part], rng)
        if part == "receipt":
            parts["header"] = {**header, "__metadata__": {"format": "pt", "veneer": json.dumps(parts["receipt"])}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(parts["settings"]))
        (tmp_path / "adapter_model.safetensors").write_bytes(file_bytes(parts["header"], data))
        with contextlib.suppress(CheckpointError):
            asdict(view(read_adapter(tmp_path)))
        try:
            adapter = bank.load(tmp_path, name="changed")
        except CheckpointError:
            refused += 1
            continue
        loaded += 1
        asdict(view(adapter, bank))
        with bank.use("changed"):
            assert torch.equal(outputs(bank.model), expected)
        bank.remove("changed")
    assert torch.equal(outputs(bank.model), plain)
    assert refused > count // 8 and loaded + refused == count


def test_odd_settings_without_a_receipt_are_refused_or_finite(source: Path, tmp_path: Path) -> None:
    """PEFT's own folders have no receipt to hold settings against: what loads then is still an adapter, with finite answers."""
    bank = veneer.attach(base_model())
    adapter = bank.add("a", LoRA(r=2, target_modules=("q_proj",)))
    stir(nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "")
    bank.save("a", tmp_path)
    header, data = read_file(tmp_path / "adapter_model.safetensors")
    del header["__metadata__"]
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes(file_bytes(header, data))
    rng = random.Random(3)
    refused = 0
    for _ in range(250):
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed(settings, rng)))
        try:
            bank.load(tmp_path, name="changed")
        except CheckpointError:
            refused += 1
            continue
        with bank.use("changed"):
            assert outputs(bank.model).isfinite().all()
        bank.save("changed", tmp_path / "again")
        bank.remove("changed")
    assert refused > 50
