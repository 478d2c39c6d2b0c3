"""DoRA: W' = m (W + s B A) / ||W + s B A||_row with a learnt magnitude m per output (Liu et al. 2024, arXiv 2402.09353, eq. 5).

The paper writes the norm per column of a d x k matrix; the code that everybody reproduces takes it per output, m [out], and so do
we. The norm is a constant in backward (section 4.3, eq. 11) unless ``exact_norm_gradient``. m starts as the square root of the very
||W||^2 that the norm uses, so the first gain is exactly one. Masters, m included, are fp32: a bf16 magnitude near 1 cannot take
steps below 0.004.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.methods.initialisers import initial_factors
from veneer.adapters.methods.lora import SquaredNorms, factors_2d
from veneer.adapters.methods.options import LowRankOptions
from veneer.kernels.lora.dora_norm import dora_norm, dora_norms

MAGNITUDE = "lora_magnitude_vector"


@final
class DoRA(LowRankOptions):
    """A low-rank change of direction and a learnt magnitude per output."""

    name: ClassVar[str] = "dora"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding", "conv2d")
    tags: ClassVar[tuple[str, ...]] = ("lora", "dora")
    """Tags of a model card."""
    needs_base_weights: ClassVar[bool] = True
    """Whether the delta depends on the base weights."""
    has_gain: ClassVar[bool] = True

    dropout_form: Literal["low_rank", "peft"] = "low_rank"
    """"low_rank" drops the low-rank branch only; "peft" also feeds the dropped input to a second base product."""
    exact_norm_gradient: bool = False
    """Let the gradient flow through the norm (paper eq. 6) instead of holding it constant (eq. 11)."""

    @property
    def label(self) -> str:
        """Name of the method as the field writes it."""
        return "DoRA"

    def peft_flags(self) -> dict[str, bool]:
        """Keys of PEFT's ``adapter_config.json`` that tell this method from others."""
        return {"use_dora": True}

    @property
    def norm_is_constant(self) -> bool:
        """Whether backward takes the norm as a number."""
        return not self.exact_norm_gradient

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        """Names on disk of a site's tensors, factors first."""
        factors = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
        return (*factors, MAGNITUDE)

    def init(
        self, geometry: Geometry, r: int, squared: SquaredNorms, generator: torch.Generator, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """A new site's tensors; the adapted layer then equals the base exactly."""
        a, b = initial_factors(self.init_lora_weights, geometry, r, generator, dtype)
        magnitude = squared().sqrt().to(dtype=dtype, device="cpu")
        return dict(zip(self.tensor_names(geometry.kind), (a, b, magnitude), strict=True))

    def norm(self, tensors: dict[str, Tensor], weight_2d: Tensor, squared: Tensor, scale: float) -> Tensor | None:
        """||W + s B A||_row, [out]: a constant in backward unless ``exact_norm_gradient``."""
        with torch.set_grad_enabled(self.exact_norm_gradient and torch.is_grad_enabled()), _wide(weight_2d):
            return dora_norm(weight_2d, squared, *_factors(tensors), scale)

    @staticmethod
    def constant_norms(
        weight_2d: Tensor, squared: Tensor, adapters: Sequence[tuple[Mapping[str, Tensor], float]]
    ) -> list[Tensor]:
        """||W + s B A||_row of several adapters at one site, (tensors, s) each, as constants."""
        with torch.no_grad(), _wide(weight_2d):
            return dora_norms(weight_2d, squared, [(*_factors(tensors), scale) for tensors, scale in adapters])

    def gain(self, tensors: dict[str, Tensor], norm: Tensor) -> Tensor:
        """S = m / ||W + s B A||_row, [out]."""
        return tensors[MAGNITUDE].to(norm.dtype) / norm

    def merged(self, weight_2d: Tensor, tensors: dict[str, Tensor], scale: float) -> Tensor:
        """W' [out, in] in the dtype of ``weight_2d``."""
        a, b = factors_2d(tensors, weight_2d.dtype)
        moved = torch.addmm(weight_2d, b, a, alpha=scale)
        norm = moved.norm(dim=1).clamp_min(torch.finfo(moved.dtype).tiny)
        gain: Tensor = tensors[MAGNITUDE].detach().to(moved) / norm
        return moved * gain.unsqueeze(1)


def _factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [O, R]."""
    if "lora_embedding_A" in tensors:
        return tensors["lora_embedding_A"], tensors["lora_embedding_B"]
    return tensors["lora_A"].flatten(1), tensors["lora_B"].flatten(1)


def _wide(weight_2d: Tensor) -> AbstractContextManager[object]:
    """Under autocast the products would be rounded to bf16, and the norm is where a small change of a large row must show."""
    return nullcontext() if weight_2d.is_meta else torch.autocast(weight_2d.device.type, enabled=False)
