"""Demonstration data from the interpreter's own library."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tests.data.families import tokenizer_of

from veneer.data import stdlib_docs
from veneer.data.chat.render import Renderer
from veneer.data.rows.row import Row
from veneer.data.stdlib_docs import INSTRUCTION, stdlib_pairs
from veneer.errors import DataError


@lru_cache(maxsize=1)
def made() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return stdlib_pairs()


def code_of(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"]).removeprefix(f"{INSTRUCTION}\n\n")


def test_there_are_thousands_of_pairs_from_many_modules() -> None:
    """Enough to learn from: thousands of pairs, over a hundred modules, about a tenth held out."""
    train, valid = made()
    modules = {row["module"].split(".")[0] for row in (*train, *valid)}
    assert 4000 < len(train) + len(valid) < 9000 and len(modules) > 110
    assert 0.05 < len(valid) / (len(train) + len(valid)) < 0.2


def test_modules_are_held_out_whole() -> None:
    """No module is on both sides, no code is either, and tests of the library are on none."""
    train, valid = made()
    sides = [{row["module"].split(".")[0] for row in rows} for rows in (train, valid)]
    assert not sides[0] & sides[1]
    codes = [code_of(row) for row in (*train, *valid)]
    assert len(codes) == len(set(codes))
    assert not any({"test", "tests", "idlelib", "lib2to3"} & set(row["module"].split(".")) for row in (*train, *valid))


def test_the_answer_does_not_stand_in_the_question() -> None:
    """The docstring is taken out of the code, and code is cut at the bound."""
    train, valid = made()
    for row in (*train, *valid):
        question, answer = (message["content"] for message in row["messages"])
        assert len(code_of(row)) <= 900 and 15 <= len(answer) <= 300 and "\n" not in answer
        assert not ast_docstring(code_of(row)), question


def ast_docstring(code: str) -> str | None:
    """The docstring that a piece of code still has; pieces that were cut do not parse and are passed over."""
    try:
        (node,) = ast.parse(code).body
    except (SyntaxError, ValueError):
        return None
    return ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


def test_the_pairs_are_the_same_in_every_process() -> None:
    """Another process with another hash seed makes the same rows in the same order."""
    script = (
        "import hashlib, json; from veneer.data.stdlib_docs import stdlib_pairs; "
        "print(hashlib.sha256(json.dumps(stdlib_pairs()).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(json.dumps(made()).encode()).hexdigest()


MODULE = '''
import nowhere_to_be_found

class Thing:
    @property
    @staticmethod
    def inner(self):
        """Return the inner thing. And more.

        Much more.
        """
        return self.{name}

    async def later(self):
        """Wait for the outer thing to end!"""
        await self.{name}()

def only_words():
    """There is nothing but this docstring."""

def one_line(): """All of it on a single line."""; return {name!r}

def brief():
    """Short."""
    return {name!r}

def silent():
    return {name!r}

def long():
    """Do a long thing whose sentence has no end
    on its first line."""
    return [{numbers}]

def headed():
    """A heading of some length
    Return the name."""
    return {name!r}

raise SystemExit("a module is never run")
'''


def test_small_modules_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Decorators stay, margins go, sentences end, code is cut; what has no body or no docstring is passed over."""
    for k in range(60):
        numbers = ", ".join(map(str, range(k, k + 200)))
        (tmp_path / f"module{k}.py").write_text(MODULE.format(name=f"name{k}", numbers=numbers), encoding="utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "module.py").write_text(MODULE.format(name="x", numbers="1"), encoding="utf-8")
    (tmp_path / "broken.py").write_text("def (:\n", encoding="utf-8")
    monkeypatch.setattr(stdlib_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    train, valid = stdlib_pairs(200, valid_share=0.2)
    assert len(train) + len(valid) == 180 and 30 <= len(valid) <= 42
    rows = {row["messages"][1]["content"]: code_of(row) for row in train if row["module"] == train[0]["module"]}
    name = train[0]["module"].replace("module", "name")
    assert rows.pop("Return the inner thing.") == f"@property\n@staticmethod\ndef inner(self):\n    return self.{name}"
    assert rows.pop("Wait for the outer thing to end!") == f"async def later(self):\n    await self.{name}()"
    assert len(rows.pop("Do a long thing whose sentence has no end on its first line.")) in (199, 200) and not rows


def test_pairs_can_be_rendered() -> None:
    """Every pair is a conversation that trains its sentence."""
    renderer = Renderer(tokenizer_of("chatml"))
    rows = [Row.chat(f"stdlib:{k}", row["messages"]) for k, row in enumerate(made()[1][:200])]
    for row, found in renderer.render_many(rows):
        assert isinstance(found, list) and row is not None
        (piece,) = found
        assert piece.text[slice(*piece.turns[0][1:])] == row.messages[1]["content"] + "<|im_end|>"


def test_an_interpreter_without_sources_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the library's sources are not installed, the error says so."""
    monkeypatch.setattr(stdlib_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="sources of Python's standard library, which are not installed"):
        stdlib_pairs()
