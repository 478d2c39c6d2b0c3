"""The kernels in C++, built once for the tests of this folder that ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from veneer.kernels import native


@pytest.fixture(scope="session")
def built_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that they are built into; skips where there is no compiler."""
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("kernels")
    native.build(folder)
    return folder


@pytest.fixture
def native_kernels(built_kernels: Path) -> Iterator[None]:
    """They are used inside the test, the plain forms after it."""
    native.use(built_kernels)
    assert native.reason() == ""
    yield
    native.use(None)
