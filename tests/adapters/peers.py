"""PEFT beside our own: the same adapter in both, its tensors copied in memory."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import Adapter, DoRA


def peft_twin(base: nn.Module, adapter: Adapter, **settings: Any) -> Any:
    """PEFT's model over a copy of ``base`` (one that no bank has touched) with the tensors of ``adapter``."""
    from peft import LoraConfig, get_peft_model

    method = adapter.method
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.lora_alpha,
        use_rslora=method.use_rslora,
        lora_dropout=method.lora_dropout,
        use_dora=isinstance(method, DoRA),
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        target_modules=sorted(adapter.tensors),
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config)
    inner = model.base_model.model
    with torch.no_grad():
        for site, own in adapter.tensors.items():
            for key, value in own.items():
                mine = peft_tensor(inner, site, key)
                mine.copy_(value.reshape(mine.shape))
    return model


def peft_tensor(inner: nn.Module, site: str, key: str) -> Tensor:
    """PEFT's tensor of one of our names at one of our sites."""
    found: Any = getattr(inner.get_submodule(site), key)["default"]
    tensor: Tensor = found if isinstance(found, Tensor) else found.weight
    return tensor


def inputs_of(model: nn.Module, rows: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A batch for a tiny model: token ids, with a decoder's where it has one, or images."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    if getattr(model, "main_input_name", "") == "pixel_values":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator, dtype=next(model.parameters()).dtype)}
    ids = torch.randint(3, 300, (rows, tokens), generator=generator)
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}
