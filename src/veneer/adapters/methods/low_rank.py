"""The contract of low-rank methods: W' = W + s B A, with more or less around it. The answers are those of plain LoRA.

To add a low-rank method, copy ``lora.py`` and change the answers that differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.methods.base import Method, Shapes
from veneer.adapters.methods.initialisers import MOVING, first_factors, initial_factors
from veneer.adapters.targets import by_pattern
from veneer.config import LowRankOptions
from veneer.errors import AdapterError, TargetError


class LowRankMethod(Method, LowRankOptions):
    """A method whose change of a weight is kept as two factors, A and B, perhaps with a magnitude.

    ``scale`` is s in W + s B A.
    """

    tags: ClassVar[tuple[str, ...]] = ("lora",)
    beyond_peft: ClassVar[tuple[str, ...]] = ("loraplus_lr_ratio", "shared_outer")
    tables: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    low_rank: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = True
    as_parameter: ClassVar[bool] = True
    overrides_beside: ClassVar[frozenset[str]] = frozenset({"weight", "bias", "lora_bias"})
    no_low_rank: ClassVar[str] = ""

    @property
    def size(self) -> str:
        return f"r={self.r}"

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def every_bias(self) -> bool:
        return self.bias == "all"

    @property
    def adds_bias(self) -> bool:
        return self.lora_bias

    @property
    def shares_experts(self) -> bool:
        return self.shared_outer

    def alpha(self, site: str) -> float:
        """lora_alpha at a site, alpha_pattern applied."""
        return by_pattern(self.alpha_pattern, site, self.lora_alpha)

    def scaling(self, r: int, lora_alpha: float) -> float:
        """s in W + s B A."""
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    def copies(self, survey: Survey, chosen: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """Biases of all layers, or of the adapted ones, by the option ``bias``."""
        if self.bias == "none":
            return {}
        layers = [site.name for site in survey.every()] if self.bias == "all" else chosen
        return dict.fromkeys(layers, ("bias",))

    # Tensors

    def factor_names(self, kind: str) -> tuple[str, str]:
        """Names on disk of A and B at a site of this layer kind."""
        return ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        """Names on disk of all of a site's tensors, A and B first."""
        return self.factor_names(kind)

    def shapes_of_rank(self, geometry: Geometry, r: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all of a site's tensors at rank ``r``, by name."""
        shapes = (geometry.shape_a(r), geometry.shape_b(r), (geometry.out,))
        return dict(zip(self.tensor_names(geometry.kind), shapes, strict=False))

    def tensor_shapes(self, geometry: Geometry, found: Shapes) -> dict[str, tuple[int, ...]]:
        """The rank is the first size of A."""
        return self.shapes_of_rank(geometry, found[self.factor_names(geometry.kind)[0]][0])

    def geometry(self, kind: str, found: Shapes) -> Geometry:
        """Inputs and the kernel by A, outputs by B."""
        shape_a, shape_b = (found[name] for name in self.factor_names(kind))
        kernel = shape_a[2:] if len(shape_a) == 4 else (1, 1)
        return Geometry(kind, shape_b[0], shape_a[1] if len(shape_a) > 1 else 1, (kernel[0], kernel[1]))

    def rank(self, tensors: Mapping[str, Tensor]) -> int:
        """The first size of A."""
        return int(tensors["lora_embedding_A" if "lora_embedding_A" in tensors else "lora_A"].shape[0])

    def zero_at_start(self, kind: str) -> str:
        """Name of the factor that `init` sets to zero, so that the first change is zero."""
        return self.factor_names(kind)[0 if kind == "embedding" else 1]

    def trained_first(self, kind: str) -> tuple[str, ...]:
        return (self.zero_at_start(kind),)

    def lr_ratio_tensors(self, kind: str) -> tuple[tuple[str, ...], float]:
        """B, at loraplus_lr_ratio times the rate of the rest (LoRA+)."""
        return (self.factor_names(kind)[1],), self.loraplus_lr_ratio

    def output_rows(self, tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """The tensors of a layer that has only these output rows: A is shared by all outputs, everything else is per output."""
        downs = ("lora_A", "lora_embedding_A")
        return {key: value if key in downs else value[rows] for key, value in tensors.items()}

    def init(self, site: Site, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        r = by_pattern(self.rank_pattern, site.name, max(1, self.r // site.active_experts))
        if site.is_empty:
            # A base without values: shapes are enough for counting and planning.
            shapes = self.shapes_of_rank(site.geometry, r)
            return {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}
        return self.new_tensors(site, r, generator, dtype)

    def new_tensors(self, site: Site, r: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        """`init` at rank ``r``, on a base with values."""
        geometry = site.geometry
        if self.needs_rows:
            raise AdapterError(
                "init_lora_weights is eva, which looks at training rows, and none are given here; train with veneer.train or the command, "
                "or choose another"
            )
        if self.holds_half:
            return self._factors_of_base(site, r, dtype)
        factors = initial_factors(self.init_lora_weights, geometry, r, generator, dtype)
        return dict(zip(self.factor_names(geometry.kind), factors, strict=True))

    @property
    def needs_rows(self) -> bool:
        """A of eva."""
        return self.init_lora_weights == "eva"

    @property
    def holds_half(self) -> bool:
        """The factors with which pissa and olora begin."""
        return self.init_lora_weights in MOVING

    def _factors_of_base(self, site: Site, r: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """[A_0; A_0] and [B_0, -B_0]: a change of zero."""
        geometry = site.geometry
        if geometry.kind not in ("linear", "conv1d") or r > min(geometry.out, geometry.in_):
            raise TargetError(
                f"{site.name}: {self.init_lora_weights} takes factors of a linear layer's weight up to its full rank; found a "
                f"{geometry.kind} layer of {geometry.out} x {geometry.in_} and r={r}; leave it out (exclude_modules), or lower r"
            )
        weight = site.weight_2d.to(device="cpu", dtype=dtype)
        a, b = first_factors(self.init_lora_weights, weight, r, self.scaling(r, self.alpha(site.name)))
        names = self.factor_names(geometry.kind)
        return dict(zip(names, (torch.cat([a, a]), torch.cat([b, -b], 1)), strict=True))

    def of_new_adapter(self) -> LowRankMethod:
        """With pissa and olora twice the rank, and the lora_alpha that keeps the scale there."""
        if not self.holds_half:
            return self
        factor = math.sqrt(2) if self.use_rslora else 2.0
        return self.model_copy(
            update={
                "r": 2 * self.r,
                "lora_alpha": factor * self.lora_alpha,
                "rank_pattern": {name: 2 * r for name, r in self.rank_pattern.items()},
                "alpha_pattern": {name: factor * alpha for name, alpha in self.alpha_pattern.items()},
                "init_lora_weights": "kaiming_uniform",
            }
        )

    # Merging

    def merged(self, weight_2d: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
        """W' [out, in] in the dtype of ``weight_2d``."""
        a, b = factors_2d(tensors, weight_2d.dtype)
        return torch.addmm(weight_2d, b, a, alpha=scale)

    def delta(self, tensors: Mapping[str, Tensor], scale: float, weight_2d: Tensor | None) -> Tensor:
        """W' - W [out, in] in fp32, or fp64 for an fp64 base. Methods that `needs_base_weights` require ``weight_2d``."""
        wide = torch.float64 if weight_2d is not None and weight_2d.dtype == torch.float64 else torch.float32
        a, b = factors_2d(tensors, wide)
        return scale * (b @ a)

    def delta_parts(
        self, tensors: Mapping[str, Tensor], scale: float, weight_2d: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor, float]:
        """(scale_change [out] or None, A [r, in], B [out, r], coefficient) with W' - W = diag(scale_change) W + coefficient * B A.

        Computed parts are fp64. A and B are the adapter's own tensors where nothing has to be computed.
        """
        return None, *factors_of(tensors), scale

    def tensors_of_delta(
        self, geometry: Geometry, scale_change: Tensor | None, a: Tensor, b: Tensor, weight_2d: Tensor | None
    ) -> dict[str, Tensor]:
        """The inverse of `delta_parts`: fp32 tensors of a site at scale one. Methods without a magnitude hold no scale_change."""
        shapes = geometry.shape_a(a.shape[0]), geometry.shape_b(a.shape[0])
        factors = [value.float().reshape(shape).contiguous() for value, shape in zip((a, b), shapes, strict=True)]
        return dict(zip(self.factor_names(geometry.kind), factors, strict=True))

    def changes_nothing(self, tensors: Mapping[str, Tensor]) -> bool:
        """True if a site's tensors alone show that its delta is zero."""
        return not all(bool(factor.any()) for factor in factors_of(tensors))


def low_rank(method: Method, what: str) -> LowRankMethod:
    """The method as a low-rank one. ``what``: the adapter and what is wanted of it, to begin the error with.

    Raises AdapterError for a method whose change is not kept as factors.
    """
    if not isinstance(method, LowRankMethod):
        raise AdapterError(f"{what}: {method.no_low_rank}")
    return method


def factors_2d(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) of a site as detached matrices, for every layer kind."""
    a, b = factors_of(tensors)
    return a.detach().to(dtype), b.detach().to(dtype)


def factors_of(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) of a site as matrices, for every layer kind."""
    if "lora_embedding_A" in tensors:
        return tensors["lora_embedding_A"], tensors["lora_embedding_B"]
    return tensors["lora_A"].flatten(1), tensors["lora_B"].flatten(1)
