"""The embedded base's own tokenizer and template."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import pytest
from tests.data.families import FAMILIES, conversation
from tests.data.test_masks import trained_stretches

from veneer.data.chat.render import Renderer
from veneer.data.rows.row import Row
from veneer.models.load import load_tokenizer

pytestmark = pytest.mark.real


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return load_tokenizer("smollm2-135m")


def test_masks_of_the_embedded_base() -> None:
    """Over random conversations with typed control strings, exactly the assistant's turns are trained."""
    family = next(family for family in FAMILIES if family.name == "smollm")
    rng = random.Random(0)
    rows = [Row.chat(f"rows.jsonl:{k}", conversation(rng, family)) for k in range(500)]
    for row, found in Renderer(tokenizer()).render_many(rows):
        assert row is not None and isinstance(found, list)
        (piece,) = found
        turns = [str(m["content"]) + "<|im_end|>" for m in row.messages if m["role"] == "assistant"]
        assert trained_stretches(tokenizer(), piece) == turns


def test_ids_of_the_embedded_base() -> None:
    """Clean rows have the ids of the tokenizer's own template."""
    family = next(family for family in FAMILIES if family.name == "smollm")
    rng = random.Random(1)
    renderer = Renderer(tokenizer())
    compared = 0
    for k in range(200):
        messages = conversation(rng, family, typed=False)
        (piece,) = renderer.render(Row.chat(f"rows.jsonl:{k}", messages))
        if "boundary_cut" not in piece.notes:
            theirs = tokenizer().apply_chat_template(messages, tokenize=True, return_dict=False)
            assert list(piece.ids) == theirs
            compared += 1
    assert compared > 100
