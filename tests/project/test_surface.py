"""The public names of ``import veneer``, which imports nothing heavy until one is used."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.project.source import dotted, failing, modules

import veneer

PROMISED = {"attach", "load_base", "train", "LoRA", "DoRA", "errors"}
"""Public names in the documentation; this set only grows."""


def test_public_names_are_complete() -> None:
    """Every promised name exists, and no name is there twice; the linter sorts them."""
    assert set(veneer.__all__) >= PROMISED
    assert len(veneer.__all__) == len(set(veneer.__all__))
    assert set(dir(veneer)) >= set(veneer.__all__)


@pytest.mark.parametrize("name", veneer.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    """Each public name resolves and has a docstring."""
    assert (getattr(veneer, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    """An unknown name raises AttributeError, as for any module."""
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = veneer.no_such_name


def test_import_is_cheap() -> None:
    """``import veneer`` imports neither torch nor pydantic."""
    code = "import sys, veneer; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["neither", "count", "policy"],
)
def test_waiting_threads_spin_briefly(given: dict[str, str], expected: str) -> None:
    """Threads of OpenMP that wait go to sleep soon, unless the user has chosen otherwise."""
    code = "import os, sys, veneer; sys.exit(str(os.environ.get('GOMP_SPINCOUNT')) != sys.argv[1])"
    known = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {key: value for key, value in os.environ.items() if key not in known} | given
    assert subprocess.run([sys.executable, "-c", code, expected], env=env, timeout=60, check=False).returncode == 0


def test_lists_of_public_names_are_correct() -> None:
    """Every module can be imported, and every name in its ``__all__`` exists."""

    def unknown(path: Path) -> list[str]:
        loaded = importlib.import_module(dotted(path))
        return [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)]

    assert failing([path for path in modules() if path.stem != "__main__"], unknown) == {}
