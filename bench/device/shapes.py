"""Models of known shapes with random weights, made on the device, and rows for them."""

from __future__ import annotations

import random
from typing import Any

import torch

from bench.device.supervise import Setting
from veneer.data.example import Example
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.state import quantize

_TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "qwen": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}
"""Qwen3-1.7B and Llama-3-8B."""


def made(shape: str, setting: Setting) -> Any:
    """A frozen causal language model of this shape; in bf16 unless it is tiny."""
    import transformers

    kind = {"qwen": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[shape]
    config = kind(**(_TINY if setting.tiny else _SHAPES[shape]))
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype_of(setting))
    return model.requires_grad_(False).eval()


def dtype_of(setting: Setting) -> torch.dtype:
    """The compute dtype."""
    return torch.float32 if setting.tiny else torch.bfloat16


@torch.no_grad()
def to_nf4(model: Any) -> Any:
    """The model with its linear layers but the head in NF4, one after another."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and child is not head:
                setattr(module, name, QuantizedLinear(quantize(child.weight, "nf4"), child.bias, child.weight.dtype))
    return model


def ragged(
    setting: Setting, vocabulary: int, *, tokens: int = 8192, shortest: int = 128, longest: int = 2048
) -> list[Example]:
    """Rows of log-uniform lengths with so many tokens in all, the second half of each trained; a hundredth of them if tiny."""
    if setting.tiny:
        tokens, shortest, longest = tokens // 100, max(4, shortest // 100), max(8, longest // 100)
    draw, found, left = random.Random(0), list[Example](), tokens
    while left:
        size = min(left, round(shortest * (longest / shortest) ** draw.random()))
        size = left if left - size < shortest else size
        found.append(row(draw, size, vocabulary, len(found)))
        left -= size
    return found


def row(draw: random.Random, size: int, vocabulary: int, number: int) -> Example:
    """One random row, its second half trained."""
    ids = tuple(draw.randrange(3, vocabulary) for _ in range(size))
    return Example(ids, (0.0,) * (size // 2) + (1.0,) * (size - size // 2), f"rows:{number}")


def useful_flops(model: Any, rows: list[Example], rank: int) -> float:
    """The products that a step cannot avoid: per token 4 for each weight of a linear layer and 6 for each of an adapter, the head for
    trained tokens only, and attention over the tokens before."""
    head = model.get_output_embeddings()
    linear = [(m.out_features, m.in_features) for m in model.modules() if m is not head and hasattr(m, "out_features")]
    tokens, trained = sum(map(len, rows)), sum(sum(row.weights) for row in rows)
    config = model.config
    pairs = sum(len(row) ** 2 / 2 for row in rows)
    attention = 3 * 4 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    base, adapter = sum(o * i for o, i in linear), sum(rank * (o + i) for o, i in linear)
    return tokens * (4 * base + 6 * adapter) + trained * 4 * head.out_features * head.in_features + attention
