"""DoRA: W' = m (W + s B A) / ||W + s B A||_row with a trained magnitude m per output (Liu et al. 2024, arXiv 2402.09353, eq. 5).

The paper writes the norm per column of a d x k matrix; the reference implementations take it per output, m [out], and so does this
one. The norm is a constant in backward (section 4.3, eq. 11) unless ``exact_norm_gradient``. m starts as the square root of the same
||W||^2 that the norm uses, so the first magnitude scale is exactly one. Masters, m included, are fp32: a bf16 magnitude near 1 cannot
take steps below 0.004.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.site import Site
from veneer.adapters.methods.low_rank import LowRankMethod, factors_2d, factors_of
from veneer.kernels.lora.dora_norm import dora_norm, dora_norms

MAGNITUDE = "lora_magnitude_vector"
_SMALLEST_SCALE = 1e-6
_ELEMENTS_AT_ONCE = 1 << 22


@final
class DoRA(LowRankMethod):
    """A low-rank change of direction and a trained magnitude per output."""

    name: ClassVar[str] = "dora"
    tags: ClassVar[tuple[str, ...]] = ("lora", "dora")
    flags: ClassVar[Mapping[str, bool]] = {"use_dora": True}
    beyond_peft: ClassVar[tuple[str, ...]] = (
        "loraplus_lr_ratio",
        "shared_outer",
        "dropout_form",
        "exact_norm_gradient",
    )
    needs_base_weights: ClassVar[bool] = True
    as_parameter: ClassVar[bool] = False
    serves_tied_head: ClassVar[bool] = False
    overrides_beside: ClassVar[frozenset[str]] = frozenset({"bias"})
    keeps_output: ClassVar[bool] = True

    dropout_form: Literal["low_rank", "peft"] = "low_rank"
    """"low_rank" drops the low-rank branch only; "peft" also feeds the dropped input to a second base product."""
    exact_norm_gradient: bool = False
    """Let the gradient flow through the norm (paper eq. 6) instead of holding it constant (eq. 11)."""

    @property
    def label(self) -> str:
        return "rsDoRA" if self.use_rslora else "DoRA"

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        return (*self.factor_names(kind), MAGNITUDE)

    def trained_first(self, kind: str) -> tuple[str, ...]:
        return (self.zero_at_start(kind), MAGNITUDE)

    def new_tensors(self, site: Site, r: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        factors = super().new_tensors(site, r, generator, dtype)
        return {**factors, MAGNITUDE: site.squared_norms().sqrt().to(dtype=dtype, device="cpu")}

    @property
    def norms(self) -> Literal["none", "constant", "exact"]:
        """Row norms are taken; gradients flow through them with ``exact_norm_gradient``."""
        return "exact" if self.exact_norm_gradient else "constant"

    @property
    def drops_base_product(self) -> bool:
        """PEFT's form of dropout feeds the dropped input to the base product too."""
        return self.dropout_form == "peft"

    def fast_support(
        self, weight: float | Tensor, *, exclusive: bool
    ) -> Literal["always", "unless_overwritten", "never"]:
        """The fast path takes constant norms, weight 1 and dropout of the low-rank branch only; backward reads the layer's output."""
        simple = exclusive and isinstance(weight, float) and weight == 1.0 and not self.exact_norm_gradient
        return "unless_overwritten" if simple and not (self.lora_dropout and self.drops_base_product) else "never"

    def norm(self, tensors: Mapping[str, Tensor], weight_2d: Tensor, squared: Tensor, scale: float) -> Tensor | None:
        """||W + s B A||_row, [out]: a constant in backward unless ``exact_norm_gradient``."""
        with torch.set_grad_enabled(self.exact_norm_gradient and torch.is_grad_enabled()), _without_autocast(weight_2d):
            return dora_norm(weight_2d, squared, *factors_of(tensors), scale)

    @staticmethod
    def constant_norms(
        weight_2d: Tensor, squared: Tensor, adapters: Sequence[tuple[Mapping[str, Tensor], float]]
    ) -> list[Tensor]:
        """||W + s B A||_row of several adapters at one site, (tensors, s) each, as constants."""
        with torch.no_grad(), _without_autocast(weight_2d):
            return dora_norms(weight_2d, squared, [(*factors_of(tensors), scale) for tensors, scale in adapters])

    def magnitude(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return tensors[MAGNITUDE]

    def magnitude_scale(self, tensors: Mapping[str, Tensor], norm: Tensor) -> Tensor | None:
        """S = m / ||W + s B A||_row, [out]."""
        return tensors[MAGNITUDE].to(norm.dtype) / norm

    def merged(self, weight_2d: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
        a, b = factors_2d(tensors, weight_2d.dtype)
        moved = torch.addmm(weight_2d, b, a, alpha=scale)
        norm = moved.norm(dim=1).clamp_min(torch.finfo(moved.dtype).tiny)
        magnitude_scale: Tensor = tensors[MAGNITUDE].detach().to(moved) / norm
        return moved * magnitude_scale.unsqueeze(1)

    def delta(self, tensors: Mapping[str, Tensor], scale: float, weight_2d: Tensor | None) -> Tensor:
        if weight_2d is None:
            raise ValueError("the delta of a DoRA adapter depends on the base weight")
        base = weight_2d.detach().to(torch.promote_types(weight_2d.dtype, torch.float32))
        return self.merged(base, tensors, scale) - base

    def delta_parts(
        self, tensors: Mapping[str, Tensor], scale: float, weight_2d: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor, float]:
        """(S - 1, A, S B, s): the delta (S - 1) W + S s B A keeps its factors, fp64."""
        if weight_2d is None:
            raise ValueError("the delta of a DoRA adapter depends on the base weight")
        a, b = factors_2d(tensors, torch.float64)
        magnitude_scale: Tensor = tensors[MAGNITUDE].detach().double() / _row_norms(weight_2d, scale * b, a)
        return magnitude_scale - 1, a, magnitude_scale.unsqueeze(1) * b, scale

    def tensors_of_delta(
        self, geometry: Geometry, scale_change: Tensor | None, a: Tensor, b: Tensor, weight_2d: Tensor | None
    ) -> dict[str, Tensor]:
        """The inverse of `delta_parts`: fp32 tensors of a site at scale one, with m = S ||W + B A||_row."""
        if weight_2d is None:
            raise ValueError("the magnitude of a DoRA adapter depends on the base weight")
        magnitude_scale = torch.ones(geometry.out, dtype=torch.float64) if scale_change is None else 1 + scale_change
        # A row that is scaled to nothing cannot be divided by its scale; it keeps a millionth of itself.
        least = torch.full_like(magnitude_scale, _SMALLEST_SCALE)
        magnitude_scale = torch.where(magnitude_scale.abs() < _SMALLEST_SCALE, least, magnitude_scale)
        a, b = a.float(), (b / magnitude_scale.unsqueeze(1)).float()
        # The norm is taken of the factors as they are stored, so that rounding them does not move the scale.
        norms = _row_norms(weight_2d, b.double(), a.double())
        factors = super().tensors_of_delta(geometry, None, a, b, None)
        return {**factors, MAGNITUDE: (magnitude_scale * norms).float()}

    def changes_nothing(self, tensors: Mapping[str, Tensor]) -> bool:
        """Never known from the tensors alone: the magnitude must be compared with the base weight."""
        return False


def _row_norms(weight_2d: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """||W + B A||_row in fp64, a block of rows at a time. It is never zero: a row of zeros keeps its magnitude scale 0 / norm finite."""
    step = max(1, _ELEMENTS_AT_ONCE // weight_2d.shape[1])
    blocks = zip(weight_2d.split(step), b.split(step), strict=True)
    norms = torch.cat([torch.addmm(weight.double(), rows, a).norm(dim=1) for weight, rows in blocks])
    return norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _without_autocast(weight_2d: Tensor) -> AbstractContextManager[object]:
    """Autocast would round the products to bf16, and a small change of a large row must show in its norm."""
    return nullcontext() if weight_2d.is_meta else torch.autocast(weight_2d.device.type, enabled=False)
