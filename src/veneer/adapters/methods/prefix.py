"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190): trained keys and values before those of the sequence, in every layer.

The keys and values are trained themselves, as PEFT saves them; the paper's reparameterization by an MLP is of training alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.methods.base import Shapes
from veneer.adapters.methods.virtual_tokens import TENSOR, VirtualTokens
from veneer.errors import TargetError

_SCALE = 0.02
"""Standard deviation of new keys and values: scores near zero, so that a new prefix takes its share of attention and adds little."""


@final
class PrefixTuning(VirtualTokens):
    """Trained keys and values before the sequence, [n, 2 L, W] for L layers with keys of W features."""

    name: ClassVar[str] = "prefix"
    virtual_tokens: ClassVar[Literal["embeddings", "key_values"] | None] = "key_values"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    tags: ClassVar[tuple[str, ...]] = ("prefix-tuning",)

    def choose(self, survey: Survey, *, left_out: Collection[str] = ()) -> list[str]:
        """The input embedding. Raises TargetError for a base whose layers do not all have keys and values of one size."""
        (name,) = super().choose(survey)
        if survey.sites[name].key_values is None:
            raise TargetError(
                "prefix tuning needs a base whose layers all have keys and values of one size to attend to, and this one has not; use "
                "prompt, or a method that changes layers, such as lora"
            )
        return [name]

    def tensor_shapes(self, geometry: Geometry, found: Shapes) -> dict[str, tuple[int, ...]]:
        """Keys and values of each virtual token; how many and how wide is the base's, which is asked when they are used."""
        return {
            TENSOR: shape if len(shape := found.get(TENSOR, ())) == 3 else (self.num_virtual_tokens, 2, geometry.out)
        }

    def init(self, site: Site, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        """Small random keys and values."""
        assert site.key_values is not None
        layers, width = site.key_values
        shape = (self.num_virtual_tokens, 2 * layers, width)
        if site.is_empty:
            return {TENSOR: torch.empty(shape, dtype=dtype, device="meta")}
        return {TENSOR: torch.randn(shape, generator=generator, dtype=dtype) * _SCALE}
