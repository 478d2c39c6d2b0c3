"""Literal names for patterns: the same answers as PEFT gives, without a regular expression."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoints.helpers import config, make_folder
from tests.tiny import tiny

import veneer
from veneer.checkpoints.peft import checks
from veneer.checkpoints.peft.patterns import PatternTable, ends_with, layer_of, names_for, table_for
from veneer.checkpoints.peft.tensor_names import Key, parse_key
from veneer.errors import CheckpointError

PATHS = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.xup_proj",
    "q_proj",
    "lm_head",
]
KEYS = [
    "q_proj",
    "self_attn.q_proj",
    "model.layers.0.self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    "^q_proj",
    "^q_proj$",
    "q_proj$",
    ".*\\.q_proj",
    "model.layers.1.*",
    ".*1.*",
    ".*",
    "up_proj",
    "p_proj",
    "model\\.layers\\.0\\.mlp\\.up_proj",
    "layers.0.self.attn.q_proj",
    "",
    "^",
    "$",
    ".",
    "..",
    "lm.head",
    "^model.*proj$",
    "layers",
    "0.mlp.up_proj",
]


def means(key: str, path: str) -> bool:
    """A table with this key has a value for the path."""
    return PatternTable({key: True}).get(path, False) == (True, [])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("path", PATHS)
def test_understood_keys_mean_what_peft_means(key: str, path: str) -> None:
    """Names, dots, "\\.", ".*", "^" and "$" give PEFT's own answer for every path."""
    assert means(key, path) == bool(re.match(rf"(.*\.)?({key})$", path))


@given(
    key=st.lists(st.sampled_from(["a", "b", ".", ".*", "\\.", "_", "1"]), max_size=8).map("".join),
    path=st.lists(st.sampled_from(["a", "b", "_", "1", "ab"]), min_size=1, max_size=6).map(".".join),
    start=st.sampled_from(["", "^"]),
    end=st.sampled_from(["", "$"]),
)
def test_any_understood_key_means_what_peft_means(key: str, path: str, start: str, end: str) -> None:
    """The same for random keys made of what is understood."""
    key = start + key + end
    assert means(key, path) == bool(re.match(rf"(.*\.)?({key})$", path))


@pytest.mark.parametrize(
    "key", ["(q|v)_proj", "[qv]_proj", "q_proj+", "q_?proj", "x{2}", "\\d", "a|b", "(?i)q", "a**", "\\w+", "a\\"]
)
def test_other_keys_are_not_understood(key: str) -> None:
    """What needs an expression engine is told apart, never guessed."""
    value, unclear = PatternTable({key: 3, "q_proj": 5}).get("model.q_proj", 1)
    assert (value, unclear) == (5, [key])


def test_no_key_takes_long() -> None:
    """Matching takes time in proportion to key x path."""
    start = time.process_time()
    assert means(".*a" * 200 + "b", "a" * 500) is False
    assert time.process_time() - start < 1


@given(st.data())
def test_names_and_tables_pick_exactly_what_they_should(data: st.DataObject) -> None:
    """Chosen suffixes pick the chosen paths in PEFT's way and no other; tables give each path its value."""
    word = st.sampled_from(["a", "b", "0", "1", "proj"])
    every = data.draw(
        st.lists(st.lists(word, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12, unique=True)
    )
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    names = names_for(chosen, every)
    if isinstance(names, str):
        picked = [path for path in every if re.fullmatch(names, path)]
    else:
        picked = [path for path in every if any(ends_with(path, name) for name in names)]
    assert sorted(picked) == sorted(chosen)
    values = {path: data.draw(st.sampled_from([4, 8, 16])) for path in chosen}
    table = table_for(values, 4)
    for path, value in values.items():
        hits = [key for key in table if re.match(rf"(.*\.)?({key})$", path)]
        assert (table[hits[0]] if hits else 4) == value


def test_names_are_short() -> None:
    """A name common to all chosen layers stands alone."""
    assert names_for(["m.0.q", "m.1.q"], ["m", "m.0", "m.1", "m.0.q", "m.1.q", "m.0.k"]) == ["q"]
    assert names_for(["m.0.q"], ["m.0.q", "m.1.q"]) == ["0.q"]
    assert table_for({"m.0.q": 8, "m.1.q": 8, "m.0.k": 4}, 4) == {"q": 8}


@pytest.mark.parametrize(
    ("path", "pattern", "layer"),
    [
        ("model.layers.3.mlp.up", None, 3),
        ("layers.3.up", None, None),
        ("model.layers.1.experts.7.up", None, 1),
        ("transformer.h.4.attn", None, 4),
        ("transformer.h.4", None, None),
        ("model.layers.3.mlp.up", "layers", 3),
        ("layers.3.up", "layers", 3),
        ("model.blocks.2.layers.3.up", "layers", 3),
        ("model.blocks.2.layers.3.up", "blocks", 2),
        ("model.layers.3.mlp.up", "h", None),
    ],
)
def test_layer_numbers_are_pefts(path: str, pattern: str | None, layer: int | None) -> None:
    """The layer number of a path is the one that PEFT's layers_to_transform sees."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    assert layer_of(path, pattern) == layer
    for number in range(8):
        config = LoraConfig(target_modules=[path], layers_to_transform=[number], layers_pattern=pattern)
        # PEFT takes a path that is named in full whatever its layer, so it is named by its tail.
        config.target_modules = {path.rpartition(".")[2]}
        assert bool(check_target_module_exists(config, path)) == (number == layer)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base_model.model.a.b.lora_A.weight", Key("a.b", "lora_A", "low_rank")),
        ("base_model.model.lora_A.weight", Key("", "lora_A", "low_rank")),
        ("base_model.model.a.b.lora_A.default.weight", Key("a.b", "lora_A", "low_rank", adapter="default")),
        ("a.b.lora_B.weight", Key("a.b", "lora_B", "low_rank", prefixed=False)),
        ("base_model.model.a.lora_embedding_A", Key("a", "lora_embedding_A", "low_rank")),
        ("base_model.model.a.lora_embedding_B.x", Key("a", "lora_embedding_B", "low_rank", adapter="x")),
        ("base_model.model.a.lora_magnitude_vector", Key("a", "lora_magnitude_vector", "low_rank")),
        ("base_model.model.a.lora_magnitude_vector.weight", Key("a", "lora_magnitude_vector", "low_rank")),
        (
            "base_model.model.a.lora_magnitude_vector.x.weight",
            Key("a", "lora_magnitude_vector", "low_rank", adapter="x"),
        ),
        ("base_model.model.a.lora_B.bias", Key("a", "lora_bias", "lora_bias")),
        ("base_model.model.a.base_layer.bias", Key("a", "bias", "whole", beside=True)),
        ("base_model.model.score.weight", Key("score", "weight", "whole")),
        ("base_model.model.a.token_adapter.trainable_tokens_delta", Key("a", "trainable_tokens_delta", "rows")),
    ],
)
def test_names_are_taken_apart(name: str, key: Key) -> None:
    """Today's names and older ones give layer, tensor and kind."""
    assert parse_key(name) == key


OTHERS = [
    "",
    " .",
    "weight",
    "a",
    "lora_A",
    "base_model.model.",
    "a.lora_A",
    "a.lora_A.x.y.weight",
    "a..lora_A.weight",
    "a.lora_A.bias",
    "a.lora_embedding_A.weight",
    "a.lora_C.x",
    "a.lora_A.weight.",
    "a.lora_magnitude_vector.x.y",
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_are_none(name: str) -> None:
    """What is not a tensor of an adapter is not made into one."""
    assert parse_key(name) is None


@given(st.data())
def test_a_table_answers_as_its_first_matching_key(data: st.DataObject) -> None:
    """Looking keys up changes no answer: the first key that PEFT would match gives the value."""
    letters = st.sampled_from(["a", "b", "1", "_"])
    path = st.lists(st.text(letters, min_size=1, max_size=2), min_size=1, max_size=4).map(".".join)
    part = st.sampled_from(["a", "b", "1", "_", ".", ".", "\\.", ".*"])
    key = st.builds(
        "{}{}{}".format, st.sampled_from(["", "^"]), st.lists(part, max_size=5).map("".join), st.sampled_from(["", "$"])
    )
    table = {pattern: number for number, pattern in enumerate(data.draw(st.lists(key, max_size=6, unique=True)))}
    for one in data.draw(st.lists(path, min_size=1, max_size=5)):
        expected = next((number for pattern, number in table.items() if re.match(rf"(.*\.)?({pattern})$", one)), -1)
        assert PatternTable(table).get(one, -1) == (expected, [])


def test_large_tables_and_lists_take_little_time() -> None:
    """Thousands of names, plain or as they are written, are looked up for thousands of sites, not tried one by one."""
    sites = [
        f"model.layers.{layer}.mlp.experts.{expert}.w{part}"
        for layer in range(48)
        for expert in range(64)
        for part in range(2)
    ]
    start = time.process_time()
    table = PatternTable({site: number for number, site in enumerate(sites)})
    assert [table.get(site, -1)[0] for site in sites] == list(range(len(sites)))
    values = {site: 4 + number % 5 for number, site in enumerate(sites)}
    written = PatternTable(table_for(values, 4))
    assert all(written.get(site, 4)[0] == value for site, value in values.items())
    assert names_for(sites, sites) == ["w0", "w1"]
    assert time.process_time() - start < 5


def test_too_many_patterns_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns that would be tried more often than the limit allows are refused with the remedy; names that are looked up are not."""
    monkeypatch.setattr(checks, "MAX_TRIES", 5)
    bank = veneer.attach(tiny("llama"))
    tables = {f"x{number}.*y": 4 for number in range(3)}
    with pytest.raises(CheckpointError, match="hold too many patterns; write full layer names as"):
        bank.load(make_folder(tmp_path / "a", None, config(rank_pattern=tables)))
    bank.load(make_folder(tmp_path / "b", None, config(rank_pattern={f"x{number}": 4 for number in range(3)})))


@pytest.mark.parametrize(
    "key",
    ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"],
)
def test_settings_of_great_length_take_little_time(key: str, tmp_path: Path) -> None:
    """Lists as long as are read, against as many tensors as there are sites, are judged in a second."""
    names = [f"x{number}.y" for number in range(20_000)]
    value: Any = {"rank_pattern": dict.fromkeys(names, 3), "alpha_pattern": {f"{name}.*z": 3 for name in names}}.get(
        key, names
    )
    value = list(range(20_000)) if key == "layers_to_transform" else value
    folder = make_folder(tmp_path / "a", None, config(**{key: value}))
    bank = veneer.attach(tiny("llama"))
    start = time.process_time()
    with contextlib.suppress(CheckpointError):
        bank.load(folder)
    assert time.process_time() - start < 2
