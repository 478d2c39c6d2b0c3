"""``veneer.train`` is what users call, before and after its modules were imported."""

from __future__ import annotations

import importlib

import pytest

import veneer
from veneer.errors import ConfigError


def test_the_name_stays_callable() -> None:
    """``veneer.train(...)`` trains however often it is said, and after ``import veneer.train.step``, which puts the module there."""
    for _ in range(2):
        with pytest.raises(ConfigError, match="data names no file"):
            veneer.train({})
        importlib.import_module("veneer.train.step")
