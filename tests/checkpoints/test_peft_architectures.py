"""A written folder is one that PEFT reads to the same logits, on every architecture: the rows of ``docs/peft.md``, tried again."""

from __future__ import annotations

import pytest
from tests.checkpoints.architectures import ARCHITECTURES, MULTIMODAL, TEXT
from tests.checkpoints.peft_table import row, rows_of_page

COMMON = frozenset(
    [
        "afmoe",
        "bamba",
        "beam",
        "bloom",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "falcon",
        "falcon_h1",
        "gemma3_text",
        "glm4_moe",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granitemoehybrid",
        "jamba",
        "laguna",
        "llama",
        "llama4_text",
        "longcat_flash",
        "mamba2",
        "mistral",
        "mixtral",
        "nemotron_h",
        "olmo2",
        "opt",
        "phi3",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_text",
        "qwen3_next",
        "smollm3",
        "xlnet",
        "gemma3",
        "llama4",
        "llava",
        "mllama",
        "paligemma",
        "qwen2_5_vl",
        "qwen3_vl",
        "smolvlm",
    ]
)
"""Architectures of the default suite: common ones, and those that PEFT treats in a way of its own."""
RARE = [name for name in ARCHITECTURES if name not in COMMON]


@pytest.mark.parametrize("name", sorted(COMMON))
def test_peft_reads_a_folder(name: str) -> None:
    """PEFT and Veneer compute the same from LoRA and DoRA folders with the default targets, as the page says."""
    assert row(name) == rows_of_page()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", RARE)
def test_peft_reads_a_folder_of_rare_architectures(name: str) -> None:
    """The same for all other architectures."""
    assert row(name) == rows_of_page()[name]


def test_the_page_has_every_architecture() -> None:
    """The page's rows are the architectures that are tried."""
    assert list(rows_of_page()) == list(ARCHITECTURES)
    assert len(TEXT) >= 45 and len(MULTIMODAL) >= 8 and set(ARCHITECTURES) >= COMMON
