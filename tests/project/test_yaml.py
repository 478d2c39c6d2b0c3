"""The reader of YAML: scalars of YAML 1.2, strict documents, errors with a place, and bounds on what a file can cost."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer._options.scalars import resolve_scalar
from veneer._options.yaml_file import parse_yaml
from veneer.config import load_yaml
from veneer.errors import ConfigError


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("2.", 2.0),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("12", 12),
        ("-0", 0),
        ("007", 7),
        ("0o17", 15),
        ("0xFF", 255),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("tRue", "tRue"),
        ("٣", "٣"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_words_mean_what_yaml_1_2_says(word: str, value: Any) -> None:
    """Numbers, booleans and null follow the core schema of YAML 1.2; everything else is text."""
    found = resolve_scalar(word)
    assert found == value and type(found) is type(value)


def test_not_a_number() -> None:
    """``.nan`` is the one value that is unequal to itself."""
    found = resolve_scalar(".nan")
    assert isinstance(found, float) and math.isnan(found)


def test_quoted_words_stay_text() -> None:
    """Quotes and blocks make text of anything."""
    values, _ = parse_yaml("a: '1'\nb: \"true\"\nc: |-\n  12\nd: 12\n", "x")
    assert values == {"a": "1", "b": "true", "c": "12", "d": 12}


def test_values_know_their_lines(tmp_path: Path) -> None:
    """Each value, nested ones too, is placed on the line of its key."""
    file = tmp_path / "run.yaml"
    file.write_text("# a comment\nr: 8\nrank_pattern:\n  q: 4\n  v:\n    5\nlist:\n- 1\n- 2\n")
    document = load_yaml(file)
    lines = {keys: line for keys, line in document.lines.items() if keys}
    expected = {("r",): 2, ("rank_pattern",): 3, ("rank_pattern", "q"): 4, ("rank_pattern", "v"): 5, ("list",): 7}
    assert lines == {**expected, ("list", 0): 8, ("list", 1): 9}
    assert document.place(("list", 1, "deeper")) == f"{file}, line 9"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n", "\ufeff"])
def test_an_empty_file_is_no_options(tmp_path: Path, text: str) -> None:
    """A file with nothing in it leaves every default."""
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_yaml(file).values == {}


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("r: 8\nsteps: 5\nr: 9\nsteps: 6\n", 0, ["line 3: r ", "first on line 1", "line 4: steps ", "first on line 2"]),
        ("a: 1\nb: !!python/object:os.system x\n", 2, ["tag"]),
        ("a: !!str 5\n", 1, ["tag"]),
        ("- a\n- b\n", 1, ["expected 'option: value'", "found ['a', 'b']"]),
        ("just text\n", 1, ["expected 'option: value'", "just text"]),
        ("a: 1\n---\nb: 2\n", 2, ["second document"]),
        ("a: 1\n\tb: 2\n", 2, ["not YAML"]),
        ("a: [1, 2\nb: 3\n", 2, ["not YAML"]),
        ("a: 'x\n", 2, ["not YAML"]),
        ("x: 1\na: *nothing\n", 2, ["*nothing"]),
        ("a: &x [1, *x]\n", 1, ["*x"]),
        ("? [a, b]\n: 1\n", 1, ["key"]),
        ("a: &x y\n*x : 1\n", 2, ["key"]),
        ("a: 1\nb: \x07\n", 2, ["control character", "U+0007"]),
        ('a: 1\nb: "\\ud800"\n', 2, []),
        ('a: "\\U99999999"\n', 1, ["not YAML"]),
        ("a: " + "[" * 40 + "]" * 40 + "\n", 1, ["levels of nesting"]),
        (
            "a: &a [[[[[[[[[[1]]]]]]]]]]\nb: &b [[[[[[[[[[*a]]]]]]]]]]\nc: &c [[[[[[[[[[*b]]]]]]]]]]\nd: [[*c]]\n",
            4,
            ["levels"],
        ),
    ],
)
def test_mistakes_have_a_place(tmp_path: Path, text: str, line: int, says: list[str]) -> None:
    """What is not a plain document is refused with file, line and reason; duplicate keys all at once."""
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_yaml(file)
    message = str(caught.value)
    assert str(file) in message and (not line or f"line {line}" in message)
    assert [word for word in says if word not in message] == []


def test_aliases_may_be_used(tmp_path: Path) -> None:
    """An anchor's value stands wherever its alias does."""
    file = tmp_path / "run.yaml"
    file.write_text("a: &x [q, v]\nb: *x\n")
    assert load_yaml(file).values == {"a": ["q", "v"], "b": ["q", "v"]}


def test_a_bomb_of_aliases_is_defused(tmp_path: Path) -> None:
    """Ten lines that would expand to ten billion values are refused at once."""
    file = tmp_path / "run.yaml"
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    file.write_text("\n".join(rows))
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="line 5: more than 100,000 values"):
        load_yaml(file)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: 1\nb: \xff\xfe\n", "line 2: the file is not UTF-8"),
        (b"a: " + b"x" * 1_000_001, "more than 1,000,000 bytes"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, says: str) -> None:
    """Other encodings and files of data are told apart from options."""
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_yaml(file)


@pytest.mark.parametrize("name", ["missing.yaml", ".", "a\0b"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    """A missing file, a folder and an impossible name are one sentence each."""
    with pytest.raises(ConfigError, match=r"cannot read|not a file name"):
        load_yaml(f"{tmp_path}/{name}")


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text makes the reader fail in another way than with our error."""
    message = "run.yaml"
    try:
        parse_yaml(text, "run.yaml")
    except ConfigError as error:
        message = str(error)
    assert message.startswith("run.yaml")
