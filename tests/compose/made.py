"""Bases and adapters made in memory for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.tiny import tiny
from torch import nn

from veneer.adapters import Adapter, DoRA, LoRA, Method, attach


def saved(folder: Path, arch: str = "llama", *, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A tiny model, and the same in a folder."""
    import transformers

    model = tiny(arch, dtype=dtype, **settings)
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        transformers.utils.logging.enable_progress_bar()
    return model


def trained(
    model: nn.Module, method: Method | None = None, *, name: str = "a", seed: int = 0, size: float = 0.05
) -> Adapter:
    """An adapter whose tensors have all moved, as if it had been trained."""
    bank = attach(model)
    adapter = bank.add(name, method or LoRA(r=4, lora_alpha=8), seed=seed)
    bank.detach()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return adapter.requires_grad_(False)


METHODS: dict[str, Method] = {
    "lora": LoRA(r=4, lora_alpha=8),
    "rslora": LoRA(r=9, lora_alpha=3, use_rslora=True),
    "pattern": LoRA(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 20.0}),
    "dora": DoRA(r=3, lora_alpha=6),
}
