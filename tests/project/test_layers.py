"""Imports go from a higher layer to a lower one, and the core needs torch, safetensors and pydantic only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from tests.project.source import PACKAGE, dotted, failing, imports, modules, tree

LAYERS = {
    "_version": -4,
    "errors": -4,
    "_files": -3,
    "_locks": -3,
    "_html": -3,
    "_imports": -3,
    "_terminal": -3,
    "_options": -2,
    "config": -1,
    "kernels": 0,
    "models": 1,
    "data": 1,
    "adapters": 2,
    "checkpoints": 3,
    "deltas": 4,
    "compose": 5,
    "merge": 5,
    "analysis": 5,
    "evaluate": 5,
    "training": 6,
    "serve": 7,
    "cli": 8,
    "__main__": 9,
}
"""The layer of each package. The public face, ``veneer/__init__.py``, is above all of them."""

LEAN = {"torch", "safetensors", "pydantic"}
"""Third-party packages that the core may import."""


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def climbs(syntax: ast.Module, module: str, *, package: bool = False) -> list[str]:
    """Every import of a module that does not go to a lower layer."""
    package_name = package_of(module)
    found = []
    for name, line in imports(syntax, module, package=package):
        if name.split(".")[0] != "veneer":
            continue
        other = package_of(name)
        if other == package_name and package_name:
            continue
        if other not in LAYERS:
            found.append(f"{module}:{line} imports {name}; import the package that it comes from")
        elif package_name and LAYERS[other] >= LAYERS[package_name]:
            found.append(f"{module}:{line} imports {name}, which is not below {package_name}")
    return found


def test_imports_go_downwards() -> None:
    """No file imports from another package of its layer or from a higher layer, at the top, in a function or for types."""
    assert failing(modules(), lambda path: climbs(tree(path), dotted(path), package=path.name == "__init__.py")) == {}


def test_every_package_has_a_layer() -> None:
    """A new package gets its layer before it is used."""
    packages = {package_of(dotted(path)) for path in modules()} - {""}
    assert len(packages) > 10 and packages <= set(LAYERS)


@pytest.mark.parametrize(
    "source",
    [
        "import veneer.training.loop.step",
        "from veneer.training import step",
        "from veneer import training",
        "from ..training import step",
        "from .. import training",
        "def f():\n    from veneer.training import step",
        "if TYPE_CHECKING:\n    from veneer.training.loop.step import Step",
        "importlib.import_module('veneer.training')",
        "from veneer import LoRA",
        "import veneer.data.batch",
    ],
)
def test_every_form_of_import_is_found(source: str) -> None:
    """Upward imports and imports between packages of one layer are found, however they are written."""
    assert len(climbs(ast.parse(source), "veneer.models.load")) == 1


def test_downward_imports_pass() -> None:
    """Imports from lower layers and from the own package are not reported."""
    allowed = "from veneer.kernels import x\nfrom ..errors import DataError\nfrom .cache import y\nimport torch\n"
    assert climbs(ast.parse(allowed), "veneer.models.load") == []


def lean_files() -> list[Path]:
    core = ("errors", "config", "_version", "_files", "_locks", "_html", "_options", "kernels", "adapters")
    return [path for path in modules() if package_of(dotted(path)) in core] + modules(PACKAGE / "checkpoints" / "peft")


def heavy(syntax: ast.Module, module: str, allowed: set[str], *, package: bool = False) -> set[str]:
    """Top-level packages that a module imports beyond the standard library and those allowed."""
    used = {name.split(".")[0] for name, _ in imports(syntax, module, package=package)}
    return used - set(sys.stdlib_module_names) - allowed


def test_the_core_is_lean() -> None:
    """Adapters work on any ``nn.Module`` without transformers or numpy; only options read YAML."""

    def beyond(path: Path) -> set[str]:
        allowed = LEAN | {"veneer"} | ({"yaml"} if package_of(dotted(path)) == "_options" else set())
        return heavy(tree(path), dotted(path), allowed, package=path.name == "__init__.py")

    assert failing(lean_files(), beyond) == {}


def test_the_core_covers_its_packages() -> None:
    """Every package of the core has files in the list, and a heavy import in one of them would be found."""
    folders = {"kernels": 10, "adapters": 15, "_options": 5, "checkpoints": 8}
    counts = {name: sum(package_of(dotted(path)) == name for path in lean_files()) for name in folders}
    assert all(counts[name] >= least for name, least in folders.items()), counts
    assert heavy(ast.parse("def f():\n    import transformers"), "veneer.adapters.bank", LEAN) == {"transformers"}
