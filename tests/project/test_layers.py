"""Imports go from a higher room to a lower one, and the core needs torch, safetensors and pydantic only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from tests.project.source import PACKAGE, dotted, imports, modules, tree

FLOOR = {
    "errors": -4,
    "_files": -3,
    "_options": -2,
    "config": -1,
    "kernels": 0,
    "models": 1,
    "data": 1,
    "adapters": 2,
    "checkpoints": 3,
    "deltas": 3.5,
    "compose": 4,
    "merge": 4,
    "analysis": 4,
    "evaluate": 4,
    "training": 5,
    "serve": 6,
    "cli": 7,
    "__main__": 8,
    "testing": 8,
}
"""Each room's height. The public face, ``veneer/__init__.py``, stands above all of them."""

LEAN = {"torch", "safetensors", "pydantic"}
"""What the core may import beside the standard library."""


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def climbs(source: str, module: str, *, package: bool = False) -> list[str]:
    """Every import of a module that does not go downwards."""
    own = room_of(module)
    found = []
    for name, line in imports(ast.parse(source), module, package=package):
        if name.split(".")[0] != "veneer":
            continue
        other = room_of(name)
        if other == "__version__" or (other == own and own):
            continue
        if other not in FLOOR:
            found.append(f"{module}:{line} imports {name}; import the room that it comes from")
        elif own and FLOOR[other] >= FLOOR[own]:
            found.append(f"{module}:{line} imports {name}, which is not below {own}")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: dotted(path))
def test_imports_go_downwards(path: Path) -> None:
    """No file imports from its own height or from above, at the top, in a function or for types."""
    assert climbs(path.read_text(encoding="utf-8"), dotted(path), package=path.name == "__init__.py") == []


def test_every_room_has_a_height() -> None:
    """A new room must be put on the map before it is used."""
    rooms = {room_of(dotted(path)) for path in modules()} - {""}
    assert rooms <= set(FLOOR)


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
def test_the_guard_sees_every_form_of_import(source: str) -> None:
    """The guard finds upward imports and imports between rooms of one height, however they are written."""
    assert len(climbs(source, "veneer.models.load")) == 1


def test_the_guard_lets_downward_imports_pass() -> None:
    """What is allowed is not reported."""
    allowed = "from veneer.kernels import x\nfrom ..errors import DataError\nfrom .cache import y\nimport torch\n"
    assert climbs(allowed, "veneer.models.load") == []


def lean_files() -> list[Path]:
    own = [
        path
        for path in modules()
        if room_of(dotted(path)) in ("errors", "_files", "config", "_options", "kernels", "adapters")
    ]
    return own + modules(PACKAGE / "checkpoints" / "peft")


@pytest.mark.parametrize("path", lean_files(), ids=lambda path: dotted(path))
def test_the_core_is_lean(path: Path) -> None:
    """Adapters work on any model of torch: no transformers, no numpy; only options may read YAML."""
    allowed = LEAN | {"veneer"} | ({"yaml"} if room_of(dotted(path)) == "_options" else set())
    used = {name.split(".")[0] for name, _ in imports(tree(path), dotted(path), package=path.name == "__init__.py")}
    assert used - set(sys.stdlib_module_names) - allowed == set()
