"""The structure of the package: no import circles, small folders, unique class names, references to files that exist."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from tests.project.source import PACKAGE, ROOT, circles, dotted, import_graph, modules, prose, tree

FOLDER_FILES = 15

NOT_OURS = {"llama.cpp"}
"""Names of other projects that look like names of files."""


def graph() -> dict[str, set[str]]:
    return import_graph({dotted(path): (tree(path), path.name == "__init__.py") for path in modules()})


def test_no_import_circle() -> None:
    """No two files import each other, directly or through others; imports for types and in functions count."""
    found = graph()
    assert sum(map(len, found.values())) > 300
    assert circles(found) == []


def test_circles_are_found() -> None:
    """Circles of two and three modules are reported, with imports in functions, for types and of packages counted."""
    sources = {
        "p": ("from p.a import x", True),
        "p.a": ("if TYPE_CHECKING:\n    from p.b import B", False),
        "p.b": ("def f():\n    import p.a", False),
        "p.c": ("from . import d", False),
        "p.d": ("from p.q import thing", False),
        "p.q": ("from ..c import y", False),
        "p.lone": ("import torch\nfrom p import a", False),
    }
    parsed = {name: (ast.parse(text), package) for name, (text, package) in sources.items()}
    parsed["p.q"] = (ast.parse("import p.c"), True)
    assert circles(import_graph(parsed)) == [["p.a", "p.b"], ["p.c", "p.d", "p.q"]]


def test_a_package_counts_as_its_init_file() -> None:
    """``from p import name`` depends on ``p/__init__.py`` unless ``name`` is a module."""
    sources = {"p": (ast.parse("from p.a import name"), True), "p.a": (ast.parse("from p import name"), False)}
    assert circles(import_graph(sources)) == [["p", "p.a"]]


def crowded(files: list[Path]) -> dict[str, int]:
    """{folder: files} of folders with too many; ``cli`` has one file per command."""
    counts = Counter(path.parent for path in files if path.parent.name != "cli")
    return {str(folder): count for folder, count in counts.items() if count > FOLDER_FILES}


def test_folders_are_small() -> None:
    """A folder of the package has at most 15 Python files."""
    assert len({path.parent for path in modules()}) > 10
    assert crowded(modules()) == {}


def test_crowded_folders_are_found() -> None:
    """The sixteenth file is reported, except in ``cli``."""
    files = [Path(folder, f"f{i}.py") for folder in ("a", "cli") for i in range(16)] + [Path("b", "x.py")]
    assert crowded(files) == {"a": 16}


def repeated(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """{class name: modules} of names that are defined more than once."""
    found: dict[str, list[str]] = {}
    for module, syntax in trees.items():
        for node in ast.walk(syntax):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module)
    assert found, "no class was read"
    return {name: places for name, places in found.items() if len(places) > 1}


def test_class_names_are_unique() -> None:
    """No class name is used twice in the package."""
    assert repeated({dotted(path): tree(path) for path in modules()}) == {}


def test_repeated_class_names_are_found() -> None:
    """Two classes of one name are reported, nested ones too."""
    trees = {"a": ast.parse("class X: pass\nclass Y: pass"), "b": ast.parse("def f():\n    class X: pass")}
    assert repeated(trees) == {"X": ["a", "b"]}


FILE_NAME = re.compile(r"(?<![\w/.*-])((?:[\w-]+/)*[\w-]+\.(?:py|cpp|h|md))\b(?!\.\w|\()")


def missing(text: str, files: set[str]) -> list[str]:
    """Names of source files in a text that are the end of no path in the tree."""
    names = set(FILE_NAME.findall(text)) - NOT_OURS
    return sorted(name for name in names if not any(path == name or path.endswith(f"/{name}") for path in files))


def tree_files() -> set[str]:
    """Every source file and document of the repository, relative to its root."""
    folders = ("src", "tests", "bench", "docs")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in [*found, *ROOT.glob("*.md")]}


def test_files_that_comments_name_exist() -> None:
    """Each file that a docstring or a comment of the package names is in the tree."""
    sources = [*modules(), *PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]
    files, found, looked_at = tree_files(), {}, 0
    for path in sources:
        text = prose(path.read_text(encoding="utf-8"), python=path.suffix == ".py")
        looked_at += len(FILE_NAME.findall(text))
        if lost := missing(text, files):
            found[str(path.relative_to(PACKAGE))] = lost
    assert looked_at > 20 and found == {}


def test_missing_files_are_found() -> None:
    """A name that no file has is reported wherever it stands in prose; code and other projects are not."""
    text = '"""See ``there.py`` and gone.py."""\nx = "code.py"  # and `cpp/lost.cpp`, llama.cpp, transformer.h.0\n'
    files = {"src/veneer/there.py", "src/veneer/lost.cpp"}
    assert missing(prose(text, python=True), files) == ["cpp/lost.cpp", "gone.py"]
    assert missing(prose('#include <x.h>\n#include "y.h"\n', python=False), files) == ["y.h"]
