"""Options: declared once; flags, ``--set``, YAML, schema and saved configuration derive from that."""

from __future__ import annotations

import argparse
import ast
import random
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.project.source import dotted, modules, tree

from veneer._options.text import kinds_of
from veneer.config import (
    PER_RUN_OPTIONS,
    Count,
    Flag,
    Options,
    Positive,
    Texts,
    TrainOptions,
    add_flags,
    default_learning_rate,
    differences,
    flag_name,
    given_flags,
    given_sets,
    json_schema,
    load_yaml,
    near_miss,
    resolve,
    to_yaml,
)
from veneer.errors import ConfigError


class Inner(Options):
    """Options inside other ones."""

    title: ClassVar[str] = "A part of its own"

    every: Count = 10
    """How often."""
    words: Texts = ()
    """Some words."""


class Outer(Options):
    """A set with a part inside."""

    inner: Inner = Inner()
    """The part."""
    ratio: Positive = 1.0
    """A ratio, 50% of something."""
    fast: Flag = False
    """Whether."""
    ranks: dict[str, Count] = {}
    """By pattern."""


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def parse(model: type[Options], words: list[str]) -> tuple[list[str], dict[str, Any]]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, model)
    args = parser.parse_args(words)
    return given_sets(args), given_flags(args)


def test_flag_beats_set_beats_file_beats_default(tmp_path: Path) -> None:
    """Precedence, one step at a time, and the provenance names the winner."""
    file = write(tmp_path, "data: a.jsonl\nr: 2\nsteps: 20\nseed: 5\n")
    sets, flags = parse(TrainOptions, ["--set", "r=3", "--set", "steps=30", "--r", "4"])
    options, origin = resolve(TrainOptions, file, sets, flags)
    assert (options.r, options.steps, options.seed, options.batch_size) == (4, 30, 5, 16)
    assert (origin["r"], origin["steps"], origin["seed"]) == ("--r", "--set steps=30", f"{file}, line 4")
    assert "batch_size" not in origin


def test_what_differs_from_the_defaults_is_told(tmp_path: Path) -> None:
    """Each difference has its value, its default and its source; options that were given their default have none."""
    file = write(tmp_path, "data: a.jsonl\nr: 16\nrank_pattern: {q_proj: 8}\n")
    options, origin = resolve(TrainOptions, file, ["rank_pattern.layers.0.v_proj=4"], {"clip": "none"})
    assert [str(difference) for difference in differences(options, origin)] == [
        f"data = a.jsonl (default nothing; {file}, line 1)",
        f"rank_pattern = q_proj=8,layers.0.v_proj=4 (default nothing; {file}, line 3 and --set rank_pattern.layers.0.v_proj=4)",
        "clip = none (default 1.0; --clip)",
    ]


def test_a_long_value_is_told_by_its_beginning() -> None:
    """A sweep of a thousand values does not bury what is said after it."""
    line = differences(TrainOptions(data=("a.jsonl",), sweep={"seed": [*range(1000)]}))[-1]
    assert str(line).startswith("sweep = seed=0,1,2,3") and "... (" in str(line) and len(str(line)) < 300


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    """One error lists the mistakes of all sources with their place, key, expectation, finding and near miss."""
    file = write(tmp_path, "data: a\nlearning_rat: 1e-4\nr: true\nlora_alpha: '1'\nmethod: dorra\nbetas: [0.9]\n")
    with pytest.raises(ConfigError) as caught:
        resolve(TrainOptions, file, ["oops", "lr=3", "rank_pattern.q=x"], {"clip": "much", "lora_dropout": "1"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "invalid configuration: 10 problems"
    assert sorted(lines[1:]) == sorted(
        [
            "  - --set oops: expected KEY=VALUE",
            f"  - {file}, line 2: learning_rat: unknown option; did you mean learning_rate?",
            f"  - {file}, line 3: r: expected a whole number, found true",
            f"  - {file}, line 4: lora_alpha: expected a number, found '1'",
            f"  - {file}, line 5: method: expected 'lora', 'dora', 'full', 'bitfit', 'ia3', 'houlsby', 'pfeiffer', 'vera', 'prefix' or "
            "'prompt', found 'dorra'; did you mean dora?",
            f"  - {file}, line 6: betas.1: a value is missing here",
            "  - --set lr=3: unknown option; did you mean learning_rate?",
            "  - --set rank_pattern.q=x: expected a whole number, found 'x'",
            "  - --clip: expected a number, found 'much'",
            "  - --lora-dropout: expected less than 1, found 1",
        ]
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data: a\nsteps: 1\nepochs: 1\n", "steps and epochs"),
        ("data: a\nvalid: b\nvalid_fraction: 0.1\n", "valid and valid_fraction"),
        ("data: []\n", "names no file"),
        ("steps: 5\n", "names no file"),
        ("data: a\nearly_stop_patience: 3\n", "held-out"),
        ("data: a\nname: a/b\n", "name a folder"),
        ("data: a\nlearning_rate: 0\n", "greater than 0"),
        ("data: a\nlearning_rate: .inf\n", "finite"),
        ("data: a\nr: 8.0\n", "whole number"),
        ("data: a\nuse_rslora: no\n", "true or false"),
        ("data: a\nout: 5\n", "path"),
        ("data: a\nseed: -1\n", "greater than or equal to 0"),
    ],
)
def test_values_that_cannot_be_meant(tmp_path: Path, text: str, says: str) -> None:
    """Contradictions and values out of range are refused, by file and with the reason."""
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as caught:
        resolve(TrainOptions, file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (
            "data: a\n",
            {"calibrate": "true"},
            "--calibrate chooses the values of a quantized base; give --quantize nf4 too,",
        ),
        ("data: a\nsteps: 1\n", {"epochs": "1"}, "FILE, line 2: steps and --epochs are both given"),
        ("data: a\nsteps: 1\nepochs: 1\n", {}, "FILE, line 2: steps and epochs are both given"),
        ("data: a\n", {"eva_rho": "3"}, "--eva-rho is part of --init-lora-weights eva; leave it out"),
        ("data: a\n", {"rank_pattern": "q_proj"}, "--rank-pattern: expected KEY=VALUE, found 'q_proj'"),
    ],
)
def test_checks_of_several_options_name_each_as_it_was_given(
    tmp_path: Path, text: str, flags: dict[str, str], message: str
) -> None:
    """A flag is a flag in the sentence and is not named before it too; an option of the file has its line."""
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        resolve(TrainOptions, file, (), flags)
    assert str(caught.value).startswith("invalid configuration: " + message.replace("FILE", str(file)))
    assert "`" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^invalid TrainOptions: steps and epochs are both given; "):
        TrainOptions(data="a", steps=1, epochs=1)


def test_flags_derive_from_fields() -> None:
    """Booleans get a no-form, lists repeat or take commas, mappings take pairs, nested fields get dashes."""
    words = ["--inner-every", "3", "--inner-words", "a,b", "--inner-words", "re:c{1,2}", "--fast", "--ranks", "q=4,v=5"]
    options, _ = resolve(Outer, None, *parse(Outer, words))
    assert options == Outer(inner=Inner(every=3, words=("a", "b", "re:c{1,2}")), fast=True, ranks={"q": 4, "v": 5})
    options, _ = resolve(Outer, None, *parse(Outer, ["--no-fast", "--set", "inner.every=7", "--set", "ranks.a.b=2"]))
    assert options == Outer(inner=Inner(every=7), ranks={"a.b": 2})


def test_help_shows_docstring_and_default() -> None:
    """The help of a flag is the field's docstring with the default; a percent sign does no harm."""
    parser = argparse.ArgumentParser(prog="x")
    add_flags(parser, Outer, skip=["fast"])
    text = " ".join(parser.format_help().split())
    assert "--ratio X A ratio, 50% of something (default: 1.0)" in text
    assert "--inner-every N How often (default: 10)" in text
    assert "A part of its own:" in text and "--fast" not in text


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("name", "5", "5"),
        ("name", "none", None),
        ("base", "none", "none"),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "none", None),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", "q_proj", ("q_proj",)),
        ("target_modules", "[q, 're:a,b']", ("q", "re:a,b")),
        ("layers_to_transform", "0,3", (0, 3)),
        ("activation_checkpointing", "true", True),
        ("activation_checkpointing", "auto", "auto"),
        ("columns", "prompt=question", {"prompt": "question"}),
        ("columns", "{a: b, c: 'd=e'}", {"a": "b", "c": "d=e"}),
        ("valid", "a.jsonl,b.jsonl", (Path("a.jsonl"), Path("b.jsonl"))),
    ],
)
def test_text_is_read_by_the_type_it_is_for(flag: str, text: str, value: Any) -> None:
    """What was typed becomes what the option is: names stay text, numbers become numbers."""
    options, _ = resolve(TrainOptions, None, [], {"data": ["x"], flag: text})
    assert getattr(options, flag) == value


def test_python_makes_the_same_options_and_the_same_errors() -> None:
    """Options made in Python are checked alike, and a mistake is an error of our tree."""
    with pytest.raises(ConfigError) as caught:
        TrainOptions(data="x", r=True, lerning_rate=1)
    assert "r: expected a whole number, found true" in str(caught.value)
    assert "did you mean learning_rate?" in str(caught.value)
    with pytest.raises(ConfigError, match=r"inner\.every: expected a whole number"):
        Outer(inner={"every": "x"})
    options = TrainOptions(data="x")
    with pytest.raises(ValueError, match="frozen"):
        options.r = 3


NAMES = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


@given(st.dictionaries(NAMES, NAMES, max_size=3), st.lists(NAMES, max_size=3), st.floats(1e-300, 1e300))
def test_saved_options_read_back_the_same(columns: dict[str, str], words: list[str], rate: float) -> None:
    """``to_yaml`` and the reader are inverse, whatever letters and numbers the values have."""
    from veneer._options.yaml_file import parse_yaml

    options = TrainOptions(data=("no", "1e-4"), columns=columns, target_modules=tuple(words), learning_rate=rate)
    values, _ = parse_yaml(to_yaml(options), "saved")
    assert TrainOptions(**values) == options


def test_saved_file_resolves_to_the_same_options(tmp_path: Path) -> None:
    """A saved configuration is a configuration."""
    options, _ = resolve(TrainOptions, None, ["data=a,b", "name='7'", "rank_pattern.x.0=3"], {"betas": "0.8,0.9"})
    again, origin = resolve(TrainOptions, write(tmp_path, to_yaml(options)))
    assert again == options and set(origin) >= set(TrainOptions.model_fields)


def test_schema_describes_every_option() -> None:
    """The JSON Schema has each option with its description and refuses others."""
    schema = json_schema(TrainOptions)
    assert set(schema["properties"]) == set(TrainOptions.model_fields)
    assert all(entry.get("description") for entry in schema["properties"].values())
    assert schema["additionalProperties"] is False and "required" not in schema


def test_docstrings_of_fields_are_descriptions() -> None:
    """A class in a function has them too; inherited fields keep theirs, fields without one have none."""

    class Outer(Options):
        fixed: ClassVar[int] = 3
        """A constant."""
        needed: Count
        """Must be given."""
        plain: Count = 4

    class Inner(Outer):
        more: dict[str, Count] = {}
        """Several
        lines."""

    texts = {name: field.description for name, field in Inner.model_fields.items()}
    assert texts == {"needed": "Must be given.", "plain": None, "more": "Several\nlines."}
    assert Inner(needed=2).fixed == 3 and Inner(needed=2).more == {}
    with pytest.raises(ConfigError, match="needed"):
        Inner()


@pytest.mark.parametrize("name", TrainOptions.model_fields)
def test_every_option_is_documented_and_strict(name: str) -> None:
    """Each option has a docstring; no option takes true for a number, nor a number for true or false."""
    field = TrainOptions.model_fields[name]
    assert field.description and field.description.strip().endswith(".")
    kinds = kinds_of(field.annotation)
    inside = kinds_of(kinds.item if kinds.item is not None else kinds.entry)
    for found in (kinds, inside):
        wrong: list[Any] = [True] if {int, float} & set(found.plain) else [1] if bool in found.plain else []
        for value in wrong:
            given = value if found is kinds else [value] * 2 if kinds.item is not None else {"x": value}
            with pytest.raises(ConfigError, match=name):
                TrainOptions(**{"data": "x", name: given})


def test_learning_rate_follows_the_published_fit() -> None:
    """The values that the fit gives for known bases; an unknown family gets the smaller one."""
    published = {(2048, "llama"): 4.91e-4, (3072, "llama"): 3.58e-4, (4096, "llama"): 2.86e-4, (1024, "qwen3"): 5.27e-4}
    for (hidden, family), rate in published.items():
        assert default_learning_rate(hidden, family) == pytest.approx(rate, rel=5e-3)
    assert default_learning_rate(576, "gemma") == default_learning_rate(576, "qwen2")
    assert default_learning_rate(8192, "gemma") == default_learning_rate(8192, "llama")


def test_near_misses() -> None:
    """Slips of the finger, dashes and other tools' names lead to the option; far words lead nowhere."""
    known = list(TrainOptions.model_fields)
    wanted = {"lr": "learning_rate", "--batch-sise": "batch_size", "rank": "r", "Epoch": "epochs", "model": "base"}
    assert {word: near_miss(word, known) for word in wanted} == {w: f"; did you mean {o}?" for w, o in wanted.items()}
    assert near_miss("zebra_stripes", known) == ""
    assert flag_name("inner.some_words") == "--inner-some-words"


SEED_TEXT = to_yaml(TrainOptions(data="rows.jsonl", rank_pattern={"q_proj": 4}, target_modules=("q_proj", "v_proj")))


def mutated(rng: random.Random) -> str:
    """A configuration with a few things wrong in it: keys, values, indentation, letters, whole lines."""
    lines = SEED_TEXT.splitlines()
    for _ in range(rng.randint(1, 4)):
        n = rng.randrange(len(lines))
        key, colon, value = lines[n].partition(":")
        kind = rng.randrange(8)
        if kind == 0:
            lines[n] = key + rng.choice("abxyz_") + colon + value
        elif kind == 1 and key:
            cut = rng.randrange(len(key))
            lines[n] = key[:cut] + key[cut + 1 :] + colon + value
        elif kind == 2:
            lines[n] = (
                f"{key}: {rng.choice(['x', '-1', '[]', '{}', 'null', '1e999', 'true', '[[1]]', '{a: 1}', '!!int 3', '&a *a'])}"
            )
        elif kind == 3:
            lines[n] = " " * rng.randint(1, 5) + lines[n]
        elif kind == 4:
            lines.insert(n, lines[rng.randrange(len(lines))])
        elif kind == 5:
            del lines[n]
        elif kind == 6:
            at = rng.randrange(len(lines[n]) + 1)
            lines[n] = lines[n][:at] + rng.choice("\x00\t:'\"[]{}#&*!|>%@`,?-\u2028é") + lines[n][at:]
        else:
            lines[n] = lines[n].replace(":", rng.choice(["", " ", "::", ":\n  "]), 1)
    return "\n".join(lines)


@pytest.mark.parametrize("count", [600, pytest.param(3000, marks=pytest.mark.slow)])
def test_broken_files_are_told_by_file_line_and_key(tmp_path: Path, count: int) -> None:
    """Each of many mutated configurations is read or refused with file and, where there is one, line and key."""
    rng = random.Random(7)
    refused = 0
    for _ in range(count):
        file = write(tmp_path, mutated(rng))
        try:
            options, _ = resolve(TrainOptions, file)
        except ConfigError as error:
            refused += 1
            check_message(str(error), file)
        else:
            assert set(load_yaml(file).values) <= set(TrainOptions.model_fields)
            assert isinstance(options, TrainOptions)
    assert refused > count / 3


def check_message(message: str, file: Path) -> None:
    assert str(file) in message
    for line in message.splitlines():
        if line.startswith("invalid configuration") and line.endswith("problems"):
            continue
        whole = any(text in line for text in ("required, but not given", "names no file"))
        assert whole or re.search(r"line \d+", line) or line.endswith("problems"), message
        if "unknown option" in line:
            key = line.rsplit(": unknown option")[0].rsplit(": ", 1)[-1]
            near = near_miss(key.split(".")[-1], TrainOptions.model_fields) if "." not in key else ""
            assert near in line


def test_unknown_keys_near_an_option_get_it_suggested(tmp_path: Path) -> None:
    """Each option's name with one letter too many is refused, and the right one is suggested."""
    for name in TrainOptions.model_fields:
        typo = f"{name}x"
        with pytest.raises(ConfigError, match=f"line 2: {typo}: unknown option") as caught:
            resolve(TrainOptions, write(tmp_path, f"data: a\n{typo}: 1\n"))
        assert len(name) < 2 or f"did you mean {name}?" in str(caught.value)


PER_RUN_VALUES: dict[str, Any] = {
    "compile": False,
    "activation_checkpointing": True,
    "out": "elsewhere",
    "base": "other",
}


@pytest.mark.parametrize("name", PER_RUN_OPTIONS)
def test_a_job_cannot_set_an_option_of_the_run(name: str) -> None:
    """Options marked as per run are errors inside a job and in a sweep, by their names."""
    from veneer.training.run.jobs import expand

    value = PER_RUN_VALUES.get(name, TrainOptions.model_fields[name].default)
    with pytest.raises(ConfigError, match=f"{name} is an option of the whole run"):
        expand(TrainOptions(data="x", jobs=[{"name": "a", name: value}, {"name": "b"}]), files=False)
    with pytest.raises(ConfigError, match=f"{name} (cannot be swept|is given both)"):
        expand(TrainOptions(data="x", sweep={name: [value]}), files=False)


def test_one_list_of_the_options_that_a_run_has_once() -> None:
    """The marker on the fields is the only source: no module lists these options again."""
    assert {"base", "out", "compile", "activation_checkpointing", "tokens_per_pass"} <= set(PER_RUN_OPTIONS)
    assert not {"r", "seed", "steps", "name", "data", "method"} & set(PER_RUN_OPTIONS)
    lists = []
    for path in modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.List | ast.Tuple | ast.Set):
                words = {word.value for word in node.elts if isinstance(word, ast.Constant)}
                if len(words & set(PER_RUN_OPTIONS)) >= 3 and words <= set(PER_RUN_OPTIONS):
                    lists.append(f"{dotted(path)}:{node.lineno}")
    assert lists == []


def test_former_names_are_accepted(tmp_path: Path) -> None:
    """A former name of an option means its new one in Python, YAML, --set, flags and jobs; precedence is kept."""
    assert TrainOptions(data="x", share=0).tokens_per_shared_pass == 0
    file = write(tmp_path, "data: a\nshare: 64\n")
    assert resolve(TrainOptions, file)[0].tokens_per_shared_pass == 64
    assert resolve(TrainOptions, file, ["share=32"])[0].tokens_per_shared_pass == 32
    options, origin = resolve(TrainOptions, file, *parse(TrainOptions, ["--share", "0"]))
    assert options.tokens_per_shared_pass == 0 and origin["tokens_per_shared_pass"] == "--tokens-per-shared-pass"


def test_methods_of_the_options_are_those_of_the_table() -> None:
    """``method`` takes the names of all adapter methods."""
    from veneer.adapters import METHODS

    assert set(kinds_of(TrainOptions.model_fields["method"].annotation).words) == {*METHODS}


def test_an_option_is_not_given_by_two_names() -> None:
    """The former and the current name of one option together are an error, whatever their order."""
    for values in ({"share": 64, "tokens_per_shared_pass": 0}, {"tokens_per_shared_pass": 0, "share": 64}):
        with pytest.raises(ConfigError, match="share is the former name of tokens_per_shared_pass, and both are given"):
            TrainOptions(data=("rows.jsonl",), **values)  # type: ignore[arg-type]
