"""IA3: trained vectors that scale keys, values and the feed-forward's inner activations (Liu et al. 2022, arXiv 2205.05638, section 3.3).

    W' = diag(l) W, b' = l b    at a layer whose outputs are scaled, l [out, 1]
    W' = W diag(l)              at one whose inputs are (``feedforward_modules``), l [1, in]

l starts at one. Shapes are those of PEFT; they tell which of the two a vector does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from veneer._options.other_methods import IA3Options
from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.roles import FEED_FORWARD_OUTPUT, KEY_VALUE
from veneer.adapters.layers.site import Site
from veneer.adapters.methods.base import Method, Shapes
from veneer.adapters.targets import as_list, matches
from veneer.config import Texts

VECTOR = "ia3_l"


@final
class IA3(Method, IA3Options):
    """Trained scales of outputs or inputs."""

    name: ClassVar[str] = "ia3"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    tags: ClassVar[tuple[str, ...]] = ("ia3",)
    peft_type: ClassVar[str] = "IA3"
    peft_keys: ClassVar[frozenset[str]] = frozenset({"feedforward_modules", "init_ia3_weights"})
    least_dimensions: ClassVar[tuple[int, ...]] = (2,)
    roles: ClassVar[tuple[str, ...]] = (KEY_VALUE, FEED_FORWARD_OUTPUT)
    learning_rate_factor: ClassVar[float] = 10.0
    needs_base_weights: ClassVar[bool] = True
    changes_biases: ClassVar[bool] = True
    no_low_rank: ClassVar[str] = "it scales whole rows or columns of the weights, which has full rank"

    target_modules: Literal["all-linear", "all", "auto"] | Texts = "auto"
    """Modules to scale: auto (keys, values and the last layer of each feed-forward), all-linear, or names, globs, and regular
    expressions after re:."""

    @property
    def label(self) -> str:
        return "IA3"

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        return (VECTOR,)

    def tensor_shapes(self, geometry: Geometry, found: Shapes) -> dict[str, tuple[int, ...]]:
        """A row scales inputs, a column outputs."""
        inputs = found[VECTOR][0] == 1 and found[VECTOR] != (geometry.out, 1)
        return {VECTOR: (1, geometry.in_) if inputs else (geometry.out, 1)}

    def geometry(self, kind: str, found: Shapes) -> Geometry:
        return Geometry(kind, found[VECTOR][0], found[VECTOR][1])

    def init(self, site: Site, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.feedforward_modules == "auto":
            inputs = site.role == FEED_FORWARD_OUTPUT
        else:
            inputs = any(matches(pattern, site.name) for pattern in as_list(self.feedforward_modules))
        geometry, device = site.geometry, "meta" if site.is_empty else "cpu"
        return {VECTOR: torch.ones((1, geometry.in_) if inputs else (geometry.out, 1), dtype=dtype, device=device)}

    def change(
        self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, product: Callable[[Tensor], Tensor]
    ) -> Tensor:
        moved = tensors[VECTOR] - 1
        return product(x * moved) if len(moved) == 1 and x.shape[-1] == moved.shape[1] else y * moved.squeeze(1)

    def delta(self, tensors: Mapping[str, Tensor], scale: float, weight_2d: Tensor | None) -> Tensor:
        assert weight_2d is not None
        wide = torch.promote_types(weight_2d.dtype, torch.float32)
        return weight_2d.to(wide) * (tensors[VECTOR].detach().to(weight_2d.device, wide) - 1)

    def bias_delta(self, tensors: Mapping[str, Tensor], bias: Tensor) -> Tensor | None:
        vector = tensors[VECTOR].detach()
        if tuple(vector.shape) != (len(bias), 1):
            return None
        wide = torch.promote_types(bias.dtype, torch.float32)
        return bias.to(wide) * (vector.squeeze(1).to(bias.device, wide) - 1)

    def output_rows(self, tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        vector = tensors[VECTOR]
        return {VECTOR: vector[rows] if vector.shape[1] == 1 and len(vector) > 1 else vector}

    def moved(self, tensors: Mapping[str, Tensor]) -> float:
        return float((tensors[VECTOR] - 1).norm())

    def changes_nothing(self, tensors: Mapping[str, Tensor]) -> bool:
        return bool((tensors[VECTOR] == 1).all())

    @classmethod
    def options_of(cls, settings: Mapping[str, Any], shared: Shapes) -> dict[str, Any]:
        """None: the shape of a vector tells what it scales."""
        return {}

    def peft_settings(self, tensors: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Any]:
        inputs = [name for name, held in zip(names, tensors.values(), strict=True) if held[VECTOR].shape[0] == 1]
        return {"feedforward_modules": inputs, "init_ia3_weights": True}
