"""Demonstration data from the standard library of the running interpreter.

Each row pairs a function, its code without the docstring, with the first sentence of the docstring. The sources are parsed
and never run or imported. Whole modules are held out, so that no function beside a held-out one is trained on.

    train, valid = stdlib_pairs()          rows of the messages shape
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.errors import DataError

__all__ = ["INSTRUCTION", "stdlib_pairs"]

INSTRUCTION = "Write the first sentence of this Python docstring."
"""The instruction above the code in each prompt."""

_TESTS = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "turtle", "ensurepip"}
_LEFT_OUT = _TESTS | {"site-packages", "dist-packages", "__pycache__", "pydoc_data", "_pyrepl", "__phello__"}
_SENTENCE = re.compile(r"(.+?[.!?])(?:\s+(?=[A-Z\"'`(])|$)", re.DOTALL)
_JOINED = re.compile(r"[^\s.!?]\s*\n\s*[A-Z]")
"""A line without a full stop before one that begins with a capital letter: a signature or a heading, and a sentence."""
_SHORTEST, _LONGEST = 15, 300  # characters of a sentence that becomes an answer

Rows = list[dict[str, Any]]


def stdlib_pairs(limit_chars: int = 900, *, valid_share: float = 0.1) -> tuple[Rows, Rows]:
    """Make rows for training and held-out rows, in a fixed order for a given interpreter.

    Args:
        limit_chars: maximum characters of code; the rest is cut off.
        valid_share: approximate share of the pairs that is held out.

    Returns:
        Two lists of ``{"messages": [...], "module": name}``.

    Raises:
        DataError: the library's sources are not installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    by_module: dict[str, Rows] = {}
    seen: set[str] = set()
    for path in _sources(root):
        module = _module(path, root)
        rows = by_module.setdefault(module.split(".")[0], [])
        for code, sentence in _pairs(path, limit_chars):
            if code not in seen:
                seen.add(code)
                rows.append(_row(code, sentence, module))
    held = _held_out({module: len(rows) for module, rows in by_module.items()}, valid_share)
    train = [row for module, rows in by_module.items() if module not in held for row in rows]
    valid = [row for module, rows in by_module.items() if module in held for row in rows]
    if not train or not valid:
        raise DataError(
            f"{root}: the demonstration data is made of the sources of Python's standard library, which are not installed; "
            "install them (Debian: libpython3-stdlib), or train on a file of your own"
        )
    return train, valid


def _sources(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in _LEFT_OUT and not name.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and name[:-3] not in _LEFT_OUT and not name.startswith("_sysconfig"):
                yield Path(folder, name)


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _held_out(sizes: dict[str, int], share: float) -> set[str]:
    """Select modules with about ``share`` of all pairs by the hash of their names; large modules are never selected."""
    total = sum(sizes.values())
    held: set[str] = set()
    count = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if count < share * total and 0 < sizes[name] <= max(1, total // 25):
            held.add(name)
            count += sizes[name]
    return held


def _pairs(path: Path, limit: int) -> Iterator[tuple[str, str]]:
    try:
        with tokenize.open(path) as file:
            text = file.read()
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # test files with deliberate errors
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            sentence = _first_sentence(ast.get_docstring(node))
            code = _without_docstring(node, lines) if sentence else ""
            if code:
                yield code[:limit].rstrip(), sentence


def _first_sentence(docstring: str | None) -> str:
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    found = _SENTENCE.match(paragraph)
    if _JOINED.search((docstring or "").strip()[: found.end(1) if found else None].split("\n\n")[0]):
        return ""
    sentence = found.group(1) if found else paragraph
    fits = _SHORTEST <= len(sentence) <= _LONGEST and sentence.isascii()
    return sentence if fits else ""


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The source of a function without its docstring, dedented; "" if the docstring is all of it."""
    docstring, rest = node.body[0], node.body[1:]
    if not rest or docstring.lineno <= node.lineno or docstring.end_lineno is None or node.end_lineno is None:
        return ""
    begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = [*lines[begin - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    margin = len(kept[0]) - len(kept[0].lstrip())
    return "".join(line[margin:] if not line[:margin].strip() else line for line in kept).rstrip()


def _row(code: str, sentence: str, module: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"{INSTRUCTION}\n\n{code}"},
        {"role": "assistant", "content": sentence},
    ]
    return {"messages": messages, "module": module}
