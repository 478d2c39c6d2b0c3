"""LoRA: W' = W + s B A with W frozen, A [r, in] random and B [out, r] zero at the start (Hu et al. 2021, arXiv 2106.09685).

s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``. rsLoRA and LoRA+ are options, not methods of their own: one changes
a number, the other the learning rates of two groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, final

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.methods.initialisers import initial_factors
from veneer.adapters.methods.options import LowRankOptions

SquaredNorms = Callable[[], Tensor]
"""||W_o||^2 of the base weight at a site, [out], computed when asked for."""


@final
class LoRA(LowRankOptions):
    """A low-rank change beside each adapted weight."""

    name: ClassVar[str] = "lora"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding", "conv2d")
    tags: ClassVar[tuple[str, ...]] = ("lora",)
    """Tags of a model card."""
    needs_base_weights: ClassVar[bool] = False
    """Whether the delta depends on the base weights."""
    has_gain: ClassVar[bool] = False
    norm_is_constant: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Name of the method as the field writes it."""
        return "rsLoRA" if self.use_rslora else "LoRA"

    def peft_flags(self) -> dict[str, bool]:
        """Keys of PEFT's ``adapter_config.json`` that tell this method from others."""
        return {"use_dora": False}

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        """Names on disk of a site's tensors, factors first."""
        return ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")

    def init(
        self, geometry: Geometry, r: int, squared: SquaredNorms, generator: torch.Generator, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """A new site's tensors; the adapted layer then equals the base exactly. LoRA takes no norms."""
        a, b = initial_factors(self.init_lora_weights, geometry, r, generator, dtype)
        return dict(zip(self.tensor_names(geometry.kind), (a, b), strict=True))

    def norm(self, tensors: dict[str, Tensor], weight_2d: Tensor, squared: Tensor, scale: float) -> Tensor | None:
        """LoRA has no magnitude, so no norm is taken."""
        return None

    def gain(self, tensors: dict[str, Tensor], norm: Tensor) -> Tensor | None:
        """S, the factor per output: none."""
        return None

    def merged(self, weight_2d: Tensor, tensors: dict[str, Tensor], scale: float) -> Tensor:
        """W' [out, in] in the dtype of ``weight_2d``: W + s B A."""
        a, b = factors_2d(tensors, weight_2d.dtype)
        return torch.addmm(weight_2d, b, a, alpha=scale)


def factors_2d(tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) of a site as matrices, whatever the layer kind."""
    a = tensors["lora_embedding_A"] if "lora_embedding_A" in tensors else tensors["lora_A"]
    b = tensors["lora_embedding_B"] if "lora_embedding_B" in tensors else tensors["lora_B"]
    return a.detach().flatten(1).to(dtype), b.detach().flatten(1).to(dtype)
