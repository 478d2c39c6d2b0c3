"""Bases of the benchmark, each a folder of safetensors that all contestants load.

embedded   SmolLM2-135M as unpacked by Veneer
gpt2       random weights in GPT-2's shape: 6 layers of width 512, vocabulary 16,384; fused q,k,v as Conv1D, learned positions, biases
bert       random weights in BERT's shape: 6 layers of width 512, bidirectional, a head with one more layer before the vocabulary
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 16_384
_WIDTH, _LAYERS, _HEADS, _CONTEXT = 512, 6, 8, 1024


def folder_of(name: str, out: Path) -> Path:
    """Folder of a base. A random base is created below ``out`` if it is missing."""
    if name == "embedded":
        from veneer.models.load import load_base

        path = load_base("smollm2-135m").path
        assert path is not None
        return path
    folder = out / "bases" / name
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        _MADE[name]().save_pretrained(folder)
    return folder


def vocabulary_of(name: str) -> int:
    """Vocabulary size of a base without a tokenizer; 0 for a base that has one."""
    return 0 if name == "embedded" else VOCABULARY


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=_WIDTH, n_layer=_LAYERS, n_head=_HEADS, n_positions=_CONTEXT, **none)
    )


def _bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": _WIDTH, "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS}
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            intermediate_size=4 * _WIDTH,
            max_position_embeddings=_CONTEXT,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **sizes,
        )
    )


_MADE = {"gpt2": _gpt2, "bert": _bert}
