"""The package's source files, parsed, for the tests of its structure."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "veneer"
TESTS = ROOT / "tests"


def modules(folder: Path = PACKAGE) -> list[Path]:
    """Every Python file below a folder, at least one."""
    found = sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)
    assert found, f"no Python file below {folder}"
    return found


@cache
def text(path: Path) -> str:
    """The content of a file."""
    return path.read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(text(path), str(path))


def failing(paths: Iterable[Path], check: Callable[[Path], object]) -> dict[str, object]:
    """{file: what a check found} of the files in which it finds anything; one test over all files costs less than one for each."""
    return {str(path.relative_to(ROOT)): found for path in paths if (found := check(path))}


def dotted(path: Path) -> str:
    """``src/veneer/data/batch.py`` -> ``veneer.data.batch``; the ``__init__`` of a package has the package's name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(syntax: ast.Module, module: str, *, package: bool = False) -> Iterator[tuple[str, int]]:
    """(name, line) of every import, at the top, in functions and under TYPE_CHECKING, in absolute names.

    ``from a import b`` gives ``a.b``, since b may be a module.
    """
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = parts[: len(parts) - node.level + (1 if package else 0)]
                start = ".".join([*keep, *([node.module] if node.module else [])])
            yield from ((f"{start}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := _named(node)):
            yield name, node.lineno


def _named(node: ast.Call) -> str:
    """The module that a call imports by a literal name."""
    callee = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    first = node.args[0] if node.args else None
    if callee not in ("import_module", "__import__") or not isinstance(first, ast.Constant):
        return ""
    return first.value if isinstance(first.value, str) else ""


def import_graph(sources: dict[str, tuple[ast.Module, bool]]) -> dict[str, set[str]]:
    """{module: modules of the same set that it imports}.

    Args:
        sources: {dotted name: (syntax tree, True for the ``__init__`` of a package)}.
    """
    graph: dict[str, set[str]] = {}
    for module, (syntax, package) in sources.items():
        graph[module] = set()
        for name, _ in imports(syntax, module, package=package):
            parts = name.split(".")
            prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            target = next((prefix for prefix in prefixes if prefix in sources), module)
            if target != module:
                graph[module].add(target)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (strongly connected components)."""

    def reachable(start: str) -> set[str]:
        seen, todo = set[str](), [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    reach = {module: reachable(module) for module in graph}
    groups = {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in graph
        if module in reach[module]
    }
    return sorted(sorted(group) for group in groups)


def prose(text: str, *, python: bool) -> str:
    """Comments and docstrings of a Python file; the text of a C++ file without its ``#include <...>`` lines."""
    if not python:
        return "\n".join(line for line in text.splitlines() if not line.startswith("#include <"))
    found = [
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.append(node.value.value)
    return "\n".join(found)
