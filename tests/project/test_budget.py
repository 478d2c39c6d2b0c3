"""Files and functions stay short, and every module and test has a docstring."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.project.source import TESTS, failing, modules, text, tree

FILE_LINES = 500
FUNCTION_LINES = 60
TEST_FILE_LINES = 600

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(syntax: ast.AST) -> list[Function]:
    return [node for node in ast.walk(syntax) if isinstance(node, Function)]


def length(node: Function) -> int:
    """Lines of a function without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def too_long(path: Path, most: int) -> list[str]:
    """The file, if it has too many lines."""
    lines = text(path).count("\n")
    return [f"{lines} lines; split it"] if lines > most else []


def test_files_and_functions_are_short() -> None:
    """A file of the package has at most 500 lines, a function at most 60 without its docstring."""
    assert failing(modules(), lambda path: too_long(path, FILE_LINES)) == {}
    assert failing(modules(), lambda path: [f.name for f in functions(tree(path)) if length(f) > FUNCTION_LINES]) == {}


def test_every_module_has_a_docstring() -> None:
    """A file begins with a docstring."""
    assert failing(modules(), lambda path: not ast.get_docstring(tree(path))) == {}


def undocumented(path: Path) -> list[str]:
    """Tests without a docstring."""
    return [f.name for f in functions(tree(path)) if f.name.startswith("test_") and not ast.get_docstring(f)]


def test_every_test_has_a_docstring() -> None:
    """Every test has a docstring that states the behaviour, and test files stay readable."""
    assert failing(modules(TESTS), lambda path: too_long(path, TEST_FILE_LINES)) == {}
    assert failing(modules(TESTS), undocumented) == {}


def test_length_excludes_the_docstring() -> None:
    """A long docstring does not make a function long; long code does."""
    documented = 'def f():\n    """' + "words\n" * 100 + '"""\n    return 1\n'
    lengthy = "def f():\n" + "    x = 1\n" * 70
    assert [length(functions(ast.parse(source))[0]) for source in (documented, lengthy)] == [2, 71]
