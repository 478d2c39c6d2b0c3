"""A method is one file: nothing outside ``adapters/methods`` asks which method an adapter has."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from tests.project.source import PACKAGE, dotted, modules, tree

from veneer.adapters import METHODS as TABLE

METHODS = PACKAGE / "adapters" / "methods"
CLASSES = {method.__name__ for method in TABLE.values()}
NAMES = {*TABLE}


def _last(node: ast.AST) -> str:
    """``adapter.method`` -> ``method``; ``method`` -> ``method``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_method(node: ast.AST) -> bool:
    return _last(node) == "method"


def _names_of(node: ast.AST) -> set[str]:
    return {_last(part) for part in ast.walk(node)} - {""}


def _literals(node: ast.AST) -> set[object]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}


def _question(node: ast.AST) -> str:
    """The way in which a node asks for the method, or an empty string."""
    if isinstance(node, ast.Attribute) and (
        node.attr == "has_gain" or (node.attr == "has_magnitude" and _is_method(node.value))
    ):
        return f"reads {node.attr}"
    if isinstance(node, ast.Call):
        function = _last(node.func)
        if function in ("isinstance", "issubclass") and len(node.args) == 2 and _names_of(node.args[1]) & CLASSES:
            return f"calls {function} with a method's class"
        if function in ("getattr", "hasattr") and node.args and _is_method(node.args[0]):
            return f"calls {function} on a method"
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        if any(isinstance(side, ast.Attribute) and side.attr == "name" and _is_method(side.value) for side in sides):
            return "compares a method's name"
        if any(_is_method(side) for side in sides) and any(_literals(side) & NAMES for side in sides):
            return "compares a method with a name"
        if any(isinstance(side, ast.Name) and side.id in CLASSES for side in sides):
            return "compares with a method's class"
    if isinstance(node, ast.If | ast.IfExp | ast.While) and "use_dora" in _names_of(node.test) | _literals(node.test):
        return "branches on use_dora"
    if isinstance(node, ast.BoolOp) and "use_dora" in _names_of(node):
        return "branches on use_dora"
    if isinstance(node, ast.ImportFrom) and any("MAGNITUDE" in alias.name for alias in node.names):
        return "imports the name of the magnitude"
    return ""


def questions(syntax: ast.Module) -> Iterator[str]:
    """Every place that asks which method an adapter has."""
    for node in ast.walk(syntax):
        if question := _question(node):
            yield f"line {node.lineno} {question}"  # type: ignore[attr-defined]


def outside() -> dict[str, list[str]]:
    """{module: places} outside ``adapters/methods``."""
    files = [path for path in modules() if METHODS not in path.parents]
    assert len(files) > 100 and len(modules(METHODS)) >= 3
    found = {dotted(path): list(questions(tree(path))) for path in files}
    return {module: places for module, places in found.items() if places}


def test_no_other_file_asks_for_the_method() -> None:
    """Only the files of the methods know which method does what."""
    assert outside() == {}


@pytest.mark.parametrize(
    "source",
    [
        "x = adapter.method.has_gain",
        "x = one.has_gain",
        "x = method.has_magnitude",
        "isinstance(adapter.method, DoRA)",
        "isinstance(m, (LoRA, other.DoRA))",
        "getattr(method, 'dropout_form', '')",
        "hasattr(adapter.method, 'exact_norm_gradient')",
        "x = adapter.method.name == 'dora'",
        "x = 'dora' != options.method",
        "x = options.method == 'full'",
        "x = type(m) is DoRA",
        "x = 1 if settings.use_dora else 2",
        "if not flags['use_dora']:\n    pass",
        "x = a and settings.use_dora",
        "from veneer.adapters.methods.dora import MAGNITUDE",
    ],
)
def test_every_form_of_the_question_is_found(source: str) -> None:
    """Each way to ask for the method is reported once or more."""
    assert list(questions(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "method = LoRA(r=8)",
        "from veneer.adapters.methods import DoRA, LoRA",
        "x = adapter.method.needs_base_weights",
        "print(adapter.method.name, adapter.method.label)",
        "x = layout.has_magnitude",
        "use_dora: bool = False",
    ],
)
def test_harmless_uses_are_not_reported(source: str) -> None:
    """Constructing a method, asking for a capability and printing a name are fine."""
    assert list(questions(ast.parse(source))) == []
