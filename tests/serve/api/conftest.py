"""One server for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.serve.api.made import Running, write_adapters

from veneer.adapters import DoRA, LoRA


@pytest.fixture(scope="session")
def adapters(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters sql, style (DoRA) and tone."""
    folder = tmp_path_factory.mktemp("adapters")
    methods = {"sql": LoRA(r=2), "style": DoRA(r=3), "tone": LoRA(r=4, lora_alpha=8)}
    write_adapters(place / "base", folder, methods)
    return folder


@pytest.fixture(scope="module")
def server(place: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with three adapters."""
    running = Running(place / "base", tmp_path_factory.mktemp("state"), adapters)
    yield running
    running.close()


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    """A client of the openai package."""
    return server.client()
