"""Imports that wait until they are needed."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from veneer import _imports
from veneer._imports import light_imports


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package whose module ``part`` takes long; users import its function ``solve``."""
    folder = tmp_path / "heavy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "part.py").write_text("LIMIT = 7\ndef solve(x, *, more=0):\n    return 2 * x + more\n")
    (tmp_path / "light_user.py").write_text("from heavy_package.part import solve\n")
    (tmp_path / "greedy_user.py").write_text("from heavy_package.part import LIMIT, solve\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_imports, "_HEAVY", {"heavy_package.part": ("solve",), "absent_package.part": ("solve",)})
    before = set(sys.modules)
    yield "heavy_package.part"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_imports_its_module_when_it_is_called(heavy: str) -> None:
    """A stand-in goes with the context; its function does what the module's does."""
    with light_imports():
        user = import_module("light_user")
        assert not gc.isenabled()
        with pytest.raises(ModuleNotFoundError):
            import_module("absent_package.part")
    assert gc.isenabled() and heavy not in sys.modules
    assert user.solve(3, more=1) == 7
    assert import_module(heavy).LIMIT == 7


def test_another_name_imports_the_module_at_once(heavy: str) -> None:
    """What is not a known function comes from the module itself."""
    with light_imports():
        user = import_module("greedy_user")
    assert user.LIMIT == 7 and user.solve(1) == 2
    assert sys.modules[heavy].LIMIT == 7


def test_a_loaded_module_stays(heavy: str) -> None:
    """A module in memory is not replaced."""
    module = import_module(heavy)
    with light_imports():
        assert sys.modules[heavy] is module


@pytest.mark.slow
def test_losses_of_transformers_wait_for_scipy() -> None:
    """The function of transformers' losses is a stand-in's, and works."""
    code = (
        "import sys; from veneer._imports import light_imports\n"
        "with light_imports(): import transformers.modeling_utils\n"
        "assert 'scipy.optimize' not in sys.modules\n"
        "from transformers.loss.loss_for_object_detection import linear_sum_assignment\n"
        "assert linear_sum_assignment([[2, 1], [1, 3]])[1].tolist() == [1, 0]\n"
        "assert 'scipy.optimize' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
