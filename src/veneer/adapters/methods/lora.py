"""LoRA: W' = W + s B A with W frozen, A [r, in] random and B [out, r] zero at the start (Hu et al. 2021, arXiv 2106.09685).

s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``. rsLoRA and LoRA+ are options of this method: one changes the scale,
the other the learning rates of two parameter groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from torch import Tensor

from veneer.adapters.methods.low_rank import LowRankMethod


@final
class LoRA(LowRankMethod):
    """A low-rank change beside each adapted weight."""

    name: ClassVar[str] = "lora"
    flags: ClassVar[Mapping[str, bool]] = {"use_dora": False}

    @property
    def label(self) -> str:
        return "rsLoRA" if self.use_rslora else "LoRA"

    def fast_support(
        self, weight: float | Tensor, *, exclusive: bool
    ) -> Literal["always", "unless_overwritten", "never"]:
        return "always"
