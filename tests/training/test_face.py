"""``veneer.training`` is what users call, before and after its modules were imported."""

from __future__ import annotations

import importlib

import pytest

import veneer
from veneer.errors import ConfigError


def test_the_name_stays_callable() -> None:
    """``veneer.train(...)`` trains however often it is said, and after its modules were imported."""
    for _ in range(2):
        with pytest.raises(ConfigError, match="data names no file"):
            veneer.train({})
        importlib.import_module("veneer.training.loop.step")
