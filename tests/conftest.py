"""What holds for every test: no network, no telemetry, the same examples from hypothesis each time."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", MPLBACKEND="Agg", NO_COLOR="1")

import pytest
from hypothesis import settings

settings.register_profile("veneer", derandomize=True, deadline=None)
settings.load_profile("veneer")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test reach its own machine and nothing else."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reaches for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_scan() -> None:
    """Garbage collections inside a module pass over what was there before: the tests, torch and transformers take a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def plain_forms() -> Iterator[None]:
    """A command that took the kernels in C++, as its process would to its end, leaves them to no other test."""
    yield
    if native := sys.modules.get("veneer.kernels.cpp_library"):
        native.use(None)


@pytest.fixture(scope="session")
def built_kernels() -> Path:
    """The kernels in C++ for this machine, in the cache that runs use too: one build serves all processes of the tests."""
    from veneer.kernels import cpp_library as native
    from veneer.models.cache import build_once

    if (name := native.key()) is None:
        pytest.skip("no C++ compiler")
    return build_once(f"native/{name}", native.build)


@pytest.fixture
def native_kernels(built_kernels: Path) -> Iterator[None]:
    """Kernels in C++ inside the test, plain forms after it."""
    from veneer.kernels import cpp_library as native

    native.use(built_kernels)
    assert native.reason() == ""
    yield
    native.use(None)
