"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trained embeddings of virtual tokens before the sequence."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.site import Site
from veneer.adapters.methods.base import Shapes
from veneer.adapters.methods.virtual_tokens import TENSOR, VirtualTokens, found_tokens


@final
class PromptTuning(VirtualTokens):
    """Trained embeddings before the sequence."""

    name: ClassVar[str] = "prompt"
    virtual_tokens: ClassVar[Literal["embeddings", "key_values"] | None] = "embeddings"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    tags: ClassVar[tuple[str, ...]] = ("prompt-tuning",)

    def tensor_shapes(self, geometry: Geometry, found: Shapes) -> dict[str, tuple[int, ...]]:
        """A row for each virtual token."""
        return {TENSOR: (found_tokens(found), geometry.out)}

    def init(self, site: Site, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        """Embeddings of tokens drawn from the vocabulary, which the paper finds better than random numbers (section 3.2)."""
        weight_VD = site.dense
        if weight_VD.is_meta:
            return {TENSOR: torch.empty(self.num_virtual_tokens, weight_VD.shape[1], dtype=dtype, device="meta")}
        chosen = torch.randint(len(weight_VD), (self.num_virtual_tokens,), generator=generator)
        return {TENSOR: weight_VD[chosen.to(weight_VD.device)].to(dtype).clone()}
