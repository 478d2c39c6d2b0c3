"""One tiny base for what the examples, notebooks and documents run."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import SIZES


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny base whose tokenizer has a chat template."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    tiny("llama", num_key_value_heads=1, **SIZES).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
