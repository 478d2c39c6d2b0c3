"""Docstrings of the fields of a class: the string under each annotated name.

pydantic reads them by itself (``use_attribute_docstrings``), and searches all modules in memory for every class; behind torch and
transformers that takes a tenth of a second at each start.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from collections.abc import Iterator
from functools import lru_cache


def field_docstrings(module: str, qualname: str) -> dict[str, str]:
    """Names -> docstrings of the fields that a class declares itself; empty if its source cannot be read."""
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None)
    return {} if file is None else _classes(file, module).get(qualname, {})


@lru_cache
def _classes(file: str, module: str) -> dict[str, dict[str, str]]:
    """The fields of each class in a file, by its qualified name."""
    try:
        tree = ast.parse("".join(linecache.getlines(file, vars(sys.modules[module]))))
    except SyntaxError:  # no Python source
        return {}
    return {name: _fields(node) for name, node in _definitions(tree, "")}


def _definitions(parent: ast.AST, before: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield before + node.name, node
            yield from _definitions(node, f"{before}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(node, f"{before}{node.name}.<locals>.")


def _fields(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = inspect.cleandoc(text.value.value)
    return found
