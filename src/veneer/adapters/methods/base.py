"""The contract of a method: the questions that the rest of the package asks of it, with the answers of plain low-rank methods.

To add a method, copy ``lora.py``, change the answers that differ, and add the class to the table in ``methods/__init__.py``. No other
file asks which method an adapter has: a question that is missing here becomes a property or function of this class.

The option fields are declared in ``veneer.config``, so ``LoRA(r=8)`` and a training run's ``--r 8`` are the same option.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.methods.initialisers import initial_factors
from veneer.config import LowRankOptions

SquaredNorms = Callable[[], Tensor]
"""||W_o||^2 of the base weight at a site, [out], computed when called."""


class LowRankMethod(LowRankOptions):
    """Options and behaviour of a low-rank method. Frozen; unknown options are errors.

    In all functions ``tensors`` are one site's tensors by their names on disk, ``scale`` is s in W + s B A, and ``weight_2d`` is the
    base weight as [out, in].
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding", "conv2d")
    """Layer kinds that the method acts on."""
    tags: ClassVar[tuple[str, ...]] = ("lora",)
    """Tags of a model card."""
    flags: ClassVar[Mapping[str, bool]]
    """Keys of PEFT's ``adapter_config.json`` that tell this method from others."""
    beyond_peft: ClassVar[tuple[str, ...]] = ("loraplus_lr_ratio", "shared_outer")
    """Options that PEFT's ``adapter_config.json`` has no key for."""
    needs_base_weights: ClassVar[bool] = False
    """True if the delta depends on the base weights."""
    as_parameter: ClassVar[bool] = True
    """True if PEFT can hold the change as that of a bare parameter (``target_parameters``): low-rank factors alone."""
    serves_tied_head: ClassVar[bool] = True
    """True if an output head can use the factors of the embedding that it is tied to."""
    overrides_beside: ClassVar[frozenset[str]] = frozenset({"weight", "bias", "lora_bias"})
    """Overrides that an adapter may have at a site in addition to its low-rank change."""
    keeps_output: ClassVar[bool] = False
    """True if backward needs the layer's output."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """List the options in the docstring, and let the signature name them with their defaults alone, for ``help``."""
        super().__pydantic_init_subclass__(**kwargs)
        width = max(map(len, cls.model_fields))
        lines = [
            f"    {name:<{width}}  {field.description} (default: {field.default!r})"
            for name, field in cls.model_fields.items()
        ]
        by_name = inspect.Parameter.KEYWORD_ONLY
        cls.__signature__ = inspect.Signature(
            [inspect.Parameter(name, by_name, default=field.default) for name, field in cls.model_fields.items()]
        )
        cls.__doc__ = "\n".join([cls.__doc__ or "", "", "Options:", *lines])

    @property
    def label(self) -> str:
        """Name of the method as the field writes it."""
        return self.name

    def peft_flags(self) -> dict[str, bool]:
        """Keys of PEFT's ``adapter_config.json`` that tell this method from others."""
        return dict(self.flags)

    def scaling(self, r: int, lora_alpha: float) -> float:
        """s in W + s B A."""
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    # Tensors

    def factor_names(self, kind: str) -> tuple[str, str]:
        """Names on disk of A and B at a site of this layer kind."""
        return ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        """Names on disk of all of a site's tensors, A and B first."""
        return self.factor_names(kind)

    def tensor_shapes(self, geometry: Geometry, r: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all of a site's tensors at rank ``r``, by name."""
        shapes = (geometry.shape_a(r), geometry.shape_b(r), (geometry.out,))
        return dict(zip(self.tensor_names(geometry.kind), shapes, strict=False))

    def zero_at_start(self, kind: str) -> str:
        """Name of the factor that `init` sets to zero, so that the first change is zero."""
        return self.factor_names(kind)[0 if kind == "embedding" else 1]

    def trained_first(self, kind: str) -> tuple[str, ...]:
        """Names of the tensors that receive a gradient in the first step."""
        return (self.zero_at_start(kind),)

    def output_rows(self, tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """The tensors of a layer that has only these output rows: A is shared by all outputs, everything else is per output."""
        downs = ("lora_A", "lora_embedding_A")
        return {key: value if key in downs else value[rows] for key, value in tensors.items()}

    def init(
        self, geometry: Geometry, r: int, squared: SquaredNorms, generator: torch.Generator, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """A new site's tensors; the adapted layer then equals the base exactly."""
        factors = initial_factors(self.init_lora_weights, geometry, r, generator, dtype)
        return dict(zip(self.factor_names(geometry.kind), factors, strict=True))

    # Forward

    @property
    def norms(self) -> Literal["none", "constant", "exact"]:
        """Row norms of the changed weight in the forward: unused, constants, or with gradients."""
        return "none"

    @property
    def drops_base_product(self) -> bool:
        """True if dropout acts on the base product too."""
        return False

    def fast_support(
        self, weight: float | Tensor, *, exclusive: bool
    ) -> Literal["always", "unless_overwritten", "never"]:
        """Support of the fast path for this method.

        Args:
            weight: the adapter's weight in its mix.
            exclusive: no token of the batch uses more than one adapter.

        Returns:
            "unless_overwritten" where it does so only if the model leaves the layer's output unchanged until backward.
        """
        return "never"

    def norm(self, tensors: Mapping[str, Tensor], weight_2d: Tensor, squared: Tensor, scale: float) -> Tensor | None:
        """Row norms of the changed weight, [out], or None for a method without a magnitude. ``squared`` is ||W||^2 per row."""
        return None

    @staticmethod
    def constant_norms(
        weight_2d: Tensor, squared: Tensor, adapters: Sequence[tuple[Mapping[str, Tensor], float]]
    ) -> list[Tensor]:
        """`norm` of several adapters at one site, (tensors, scale) each, without gradients; unused where `norms` is "none"."""
        return []

    def magnitude(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The trained magnitude m, [out], or None."""
        return None

    def magnitude_scale(self, tensors: Mapping[str, Tensor], norm: Tensor) -> Tensor | None:
        """S = m / norm, the factor per output [out], or None for a method without a magnitude."""
        return None

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


def factors_2d(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) of a site as detached matrices, for every layer kind."""
    a, b = factors_of(tensors)
    return a.detach().to(dtype), b.detach().to(dtype)


def factors_of(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) of a site as matrices, for every layer kind."""
    if "lora_embedding_A" in tensors:
        return tensors["lora_embedding_A"], tensors["lora_embedding_B"]
    return tensors["lora_A"].flatten(1), tensors["lora_B"].flatten(1)
