"""The package has no unfinished work, no machine's paths, and no way to run code that is not its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tests.project.source import ROOT, TESTS, dotted, failing, imports, modules, text, tree

UNFINISHED = re.compile(
    "|".join(
        ["TO" + "DO", "FIX" + "ME", r"\bXX" + r"X\b", "place" + "holder", "for " + "now", "NotImplemented" + "Error"]
    )
)
MACHINE = re.compile("(?<![A-Za-z0-9._~$}/-])/(?:home|root|Users|work|tmp)/[a-z]")
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "telnetlib"}


def texts() -> list[Path]:
    """Every file that people read: the package, its tests and its documents."""
    assert len(list(ROOT.glob("docs/**/*.md"))) > 3
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    return [*modules(), *modules(TESTS), *documents]


def marks(path: Path) -> list[str]:
    """Lines with a mark of unfinished work or a path of a machine."""
    if not (UNFINISHED.search(text(path)) or MACHINE.search(text(path))):
        return []
    lines = enumerate(text(path).splitlines(), 1)
    return [f"{n}: {line}" for n, line in lines if UNFINISHED.search(line) or MACHINE.search(line)]


def test_no_unfinished_work() -> None:
    """No mark of unfinished work and no absolute path of a developer's machine."""
    assert failing(texts(), marks) == {}


def test_unfinished_work_is_found() -> None:
    """Marks of unfinished work and paths of a machine are recognised; ordinary words and relative paths are not."""
    bad = ["# TO" + "DO: later", "raise NotImplemented" + "Error", "a place" + "holder", 'open("/' + 'home/me/x")']
    assert all(UNFINISHED.search(mark) or MACHINE.search(mark) for mark in bad)
    assert not any(UNFINISHED.search(text) or MACHINE.search(text) for text in ("forever now", "src/home/a.py"))


def dangers(syntax: ast.Module, module: str) -> list[str]:
    """Calls and imports that could run foreign code."""
    found = [f"imports {name}" for name, _ in imports(syntax, module) if name.split(".")[0] in RUNS_CODE]
    for node in ast.walk(syntax):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load"):
            found.append(f"calls {name}")
        for word in node.keywords:
            off = isinstance(word.value, ast.Constant) and word.value.value is False
            if word.arg in ("shell", "trust_remote_code", "allow_pickle") and not off:
                found.append(f"{name}(... {word.arg} ...)")
    return found


def test_no_foreign_code_is_run() -> None:
    """No pickle, no evaluated text, no shell, no remote code."""
    assert failing(modules(), lambda path: dangers(tree(path), dotted(path))) == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "subprocess.run(x, shell=True)",
        "load(name, trust_remote_code=flag)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_each_danger_is_found(source: str) -> None:
    """Each way to run foreign code is reported."""
    assert len(dangers(ast.parse(source), "veneer.models.load")) == 1


def test_harmless_calls_pass() -> None:
    """``model.eval()``, ``re.compile`` and switched-off flags are not reported."""
    assert dangers(ast.parse("model.eval()\nload(name, trust_remote_code=False)\nre.compile('a')"), "veneer.x") == []
