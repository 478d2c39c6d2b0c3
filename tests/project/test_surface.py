"""The public face: what ``import veneer`` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from tests.project.source import dotted, modules

import veneer

PROMISED = {"attach", "load_base", "train", "LoRA", "DoRA", "errors"}
"""Names that the documentation shows; this set only grows."""


def test_the_face_is_what_was_promised() -> None:
    """Every promised name is there, the list is sorted, and nothing is listed twice."""
    assert set(veneer.__all__) >= PROMISED
    assert list(veneer.__all__) == sorted(set(veneer.__all__))
    assert set(dir(veneer)) >= set(veneer.__all__)


@pytest.mark.parametrize("name", veneer.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    """Each public name resolves, and says what it is."""
    assert (getattr(veneer, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Asking for what is not there fails as it does for any module."""
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = veneer.no_such_name


def test_importing_costs_nothing() -> None:
    """``import veneer`` alone imports no torch."""
    code = "import sys, veneer; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("module", sorted({dotted(path) for path in modules()} - {"veneer.__main__"}))
def test_lists_of_public_names_are_true(module: str) -> None:
    """Every module can be imported, and what its ``__all__`` lists is there."""
    loaded = importlib.import_module(module)
    assert [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)] == []
