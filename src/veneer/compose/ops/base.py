"""An operation: a function of the deltas at one site, and the context that it runs in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter, stream_seed
from veneer.deltas.delta import SiteDelta


@dataclass(frozen=True)
class OperationSettings:
    """Numbers that operations take; each operation reads those in its ``options``. Their meaning is in the operation's file."""

    scale: float = 1.0
    """Factor on the result (the lambda of task arithmetic and TIES)."""
    density: float = 0.2
    drop: float = 0.9
    side: Literal["both", "out", "in"] = "both"
    seed: int = 0


@dataclass(frozen=True)
class SiteContext:
    """The current site: its name, the settings and, where it is known, its base weight."""

    site: str
    settings: OperationSettings
    weight: Callable[[], Tensor | None]

    def generator(self) -> torch.Generator:
        """A random stream that is a function of seed and site alone."""
        return torch.Generator().manual_seed(stream_seed(self.settings.seed, self.site))


Function = Callable[[Sequence[SiteDelta], Sequence[float], SiteContext], SiteDelta]
"""(deltas of the parents that act at the site, their weights, the site) -> one delta, before ``scale``."""

Check = Callable[[Sequence[Adapter], OperationSettings, Callable[[str], float]], None]
"""(parents, settings, the largest rank that the result can have at a site); raises ComposeError where nothing useful can come out."""


@dataclass(frozen=True)
class Operation:
    """One way to make one delta from several.

    over: the sites at which any parent acts ("all"), or those of the "first". is_sum: the result is the weighted sum itself.
    factor_wise: it works on factors, so its result is not a function of the deltas. dense: its result has full rank. options: the
    settings that it reads besides ``scale``.
    """

    name: str
    summary: str
    function: Function
    over: Literal["all", "first"] = "all"
    is_sum: bool = False
    factor_wise: bool = False
    dense: bool = False
    options: tuple[str, ...] = ()
    check: Check | None = None
