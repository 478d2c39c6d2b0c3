"""One tiny base on the disk for all tests of serving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.training.made import write_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and files of examples."""
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny products gain nothing from threads."""
    torch.set_num_threads(1)
