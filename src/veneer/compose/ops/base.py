"""What an operation is: a function of the changes at one site, and what surrounds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from veneer.adapters.adapter import stream_seed
from veneer.deltas.delta import SiteDelta


@dataclass(frozen=True)
class Settings:
    """Numbers that operations take; each reads what it knows. Their meaning stands in the operation's file."""

    scale: float = 1.0
    """Factor on the result (the lambda of task arithmetic and TIES)."""
    density: float = 0.2
    drop: float = 0.9
    side: Literal["both", "out", "in"] = "both"
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """The site that is worked on: its name and, where it is known, its base weight."""

    site: str
    settings: Settings
    weight: Callable[[], Tensor | None]

    def generator(self) -> torch.Generator:
        """A stream of random numbers that is a function of seed and site alone."""
        return torch.Generator().manual_seed(stream_seed(self.settings.seed, self.site))


Function = Callable[[Sequence[SiteDelta], Sequence[float], Place], SiteDelta]
"""(changes of the parents that act at the site, their weights, the site) -> one change, before ``scale``."""


@dataclass(frozen=True)
class Operation:
    """One way to make one change of several.

    over: "all" the sites at which any parent acts, or only those of the "first". exact: the result is the weighted sum itself.
    factor_wise: it works on factors, so that its result is not a function of the changes.
    """

    name: str
    summary: str
    function: Function
    over: Literal["all", "first"] = "all"
    exact: bool = False
    factor_wise: bool = False
