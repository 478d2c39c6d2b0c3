"""Bottleneck adapters: y' = y + U f(D y + d) + u after a layer that writes to the residual stream, before the residual is added.

    Houlsby     after attention and after the feed-forward      (Houlsby et al. 2019, arXiv 1902.00751)
    Pfeiffer    after the feed-forward                          (Pfeiffer et al. 2020, arXiv 2005.00247)

D [r, d] is normal with standard deviation 0.02; U [d, r], d and u start at zero, so that a new adapter equals the base exactly, where the
papers start near it. Biases count: 2 d r + r + d values per layer. AdapterDrop (arXiv 2010.11918) leaves out the lower layers:
``layers_to_transform`` names those that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer._options.other_methods import BottleneckOptions
from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.roles import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT
from veneer.adapters.layers.site import Site
from veneer.adapters.methods.base import Method, Shapes
from veneer.config import Texts

DOWN, DOWN_BIAS, UP, UP_BIAS = "adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias"
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class BottleneckMethod(Method, BottleneckOptions):
    """A small network after a layer."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    peft_type: ClassVar[str] = "BOTTLENECK"
    peft_keys: ClassVar[frozenset[str]] = frozenset({"mh_adapter", "non_linearity", "bottleneck_size"})
    least_dimensions: ClassVar[tuple[int, ...]] = (2, 1, 2, 1)
    no_delta: ClassVar[str] = (
        "its change is a non-linear function of the layer's output, which no weight of the layer holds"
    )
    no_low_rank: ClassVar[str] = (
        "its change is a non-linear function of the layer's output, which has no low-rank factors"
    )

    target_modules: Literal["all-linear", "all", "auto"] | Texts = "auto"
    """Modules to put an adapter behind: auto (the places of the paper), or names, globs, and regular expressions after re:."""

    @property
    def size(self) -> str:
        return f"bottleneck_size={self.bottleneck_size}"

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        return (DOWN, DOWN_BIAS, UP, UP_BIAS)

    def tensor_shapes(self, geometry: Geometry, found: Shapes) -> dict[str, tuple[int, ...]]:
        width, size = geometry.out, found[DOWN][0]
        return {DOWN: (size, width), DOWN_BIAS: (size,), UP: (width, size), UP_BIAS: (width,)}

    def geometry(self, kind: str, found: Shapes) -> Geometry:
        return Geometry(kind, found[DOWN][1], 1)

    def init(self, site: Site, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        device = "meta" if site.is_empty else "cpu"
        shapes = self.tensor_shapes(site.geometry, {DOWN: (self.bottleneck_size, site.geometry.out)})
        made = {key: torch.zeros(shape, dtype=dtype, device=device) for key, shape in shapes.items()}
        if device == "cpu":
            made[DOWN].normal_(0, 0.02, generator=generator)
        return made

    def trained_first(self, kind: str) -> tuple[str, ...]:
        return (UP, UP_BIAS)

    def zero_at_start(self, kind: str) -> str:
        return UP

    def change(
        self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, product: Callable[[Tensor], Tensor]
    ) -> Tensor:
        inner = FUNCTIONS[self.non_linearity](F.linear(y, tensors[DOWN], tensors[DOWN_BIAS]))
        return F.linear(inner, tensors[UP], tensors[UP_BIAS])

    def peft_settings(self, tensors: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Any]:
        return {
            **self.flags,
            "non_linearity": self.non_linearity,
            "bottleneck_size": self.bottleneck_size,
        }


@final
class Houlsby(BottleneckMethod):
    """Two bottlenecks per block."""

    name: ClassVar[str] = "houlsby"
    tags: ClassVar[tuple[str, ...]] = ("houlsby", "bottleneck")
    flags: ClassVar[Mapping[str, bool]] = {"mh_adapter": True}
    roles: ClassVar[tuple[str, ...]] = (ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT)

    non_linearity: Literal["relu", "gelu", "swish", "tanh"] = "swish"
    """Function between the projections."""

    @property
    def label(self) -> str:
        return "Houlsby"


@final
class Pfeiffer(BottleneckMethod):
    """One bottleneck per block."""

    name: ClassVar[str] = "pfeiffer"
    tags: ClassVar[tuple[str, ...]] = ("pfeiffer", "bottleneck")
    flags: ClassVar[Mapping[str, bool]] = {"mh_adapter": False}
    roles: ClassVar[tuple[str, ...]] = (FEED_FORWARD_OUTPUT,)

    @property
    def label(self) -> str:
        return "Pfeiffer"
