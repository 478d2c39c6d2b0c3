"""The common part of prompt tuning and prefix tuning: one tensor, which stands before the sequence and changes no layer.

The tensor is kept at the base's input embedding, under PEFT's name. ``before`` says what it holds, and ``adapters/sequence.py`` puts it
before the segments of flat batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from veneer.adapters.layers.site import Survey
from veneer.adapters.methods.base import Method, Shapes
from veneer.adapters.sequence_state import is_lengthened
from veneer.config import VirtualTokenOptions
from veneer.errors import RouteError, TargetError

TENSOR = "prompt_embeddings"
"""Name of the tensor, on disk too."""


class VirtualTokens(Method, VirtualTokenOptions):
    """The base class of methods that put virtual tokens before the sequence."""

    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    learning_rate_factor: ClassVar[float] = 10.0
    serves_tied_head: ClassVar[bool] = False
    overrides_beside: ClassVar[frozenset[str]] = frozenset()
    no_delta: ClassVar[str] = "it changes the sequence and no weight"
    no_low_rank: ClassVar[str] = "it changes the sequence and has no low-rank factors"

    @property
    def label(self) -> str:
        """Name of the method as the field writes it."""
        return f"{self.name} tuning"

    @property
    def size(self) -> str:
        """The option that sets the number of trained values."""
        return f"num_virtual_tokens={self.num_virtual_tokens}"

    def choose(self, survey: Survey, *, left_out: Collection[str] = ()) -> list[str]:
        """The input embedding, where the tensor is kept.

        Raises TargetError for options that choose layers, and for a base that cannot take virtual tokens.
        """
        if self.target_modules != "all-linear" or self.exclude_modules or self.layers_to_transform is not None:
            raise TargetError(
                f"{self.label} adapts no layer: leave out target_modules, exclude_modules and layers_to_transform"
            )
        name = next((site.name for site in survey.sites.values() if site.is_input), None)
        if name is None:
            raise TargetError(f"{self.label} needs the base's input embedding, and none was found; use another method")
        return [name]

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        """Names of the tensors at the input embedding."""
        return (TENSOR,) if kind == "embedding" else ()

    def change(
        self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, product: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Zero: the tensor stands before the sequence.

        Raises RouteError in a call of the model whose batch has no virtual tokens.
        """
        if not is_lengthened():
            raise RouteError(
                f"{self.label} lengthens the sequence, so it acts in training and evaluation, which lengthen the batch, and not in other "
                "calls of the model (model(...), generation, serving); use a method that changes layers, such as lora"
            )
        return torch.zeros_like(y)


def found_tokens(found: Shapes) -> int:
    """The number of virtual tokens of a tensor in a file."""
    shape = found.get(TENSOR, ())
    return shape[0] if shape else 0
