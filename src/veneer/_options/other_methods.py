"""Options of the methods that are not of low rank: IA3, bottleneck adapters and VeRA."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from veneer._options.base import Positive, Texts, Whole
from veneer._options.method import MethodOptions

Size = Annotated[int, Field(strict=True, ge=1, le=16384)]


class IA3Options(MethodOptions):
    """Options of IA3."""

    title: ClassVar[str] = "IA3"

    feedforward_modules: Literal["auto"] | Texts = "auto"
    """IA3: modules whose inputs are scaled in place of their outputs; auto takes the last layer of each feed-forward."""


class BottleneckOptions(MethodOptions):
    """Options of the bottleneck adapters."""

    title: ClassVar[str] = "Bottleneck adapters"

    bottleneck_size: Size = 64
    """Bottleneck adapters: width between the down and the up projection."""
    non_linearity: Literal["relu", "gelu", "swish", "tanh"] = "relu"
    """Bottleneck adapters: function between the projections."""


class VeRAOptions(MethodOptions):
    """Options of VeRA."""

    title: ClassVar[str] = "VeRA"

    vera_rank: Size = 256
    """VeRA: rank of the shared random projections."""
    projection_prng_key: Whole = 0
    """VeRA: seed of the shared random projections."""
    d_initial: Positive = 0.1
    """VeRA: first value of the vector over ranks."""
