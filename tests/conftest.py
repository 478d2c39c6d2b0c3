"""What holds for every test: no network, no telemetry, the same examples from hypothesis each time."""

from __future__ import annotations

import os
import socket
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
