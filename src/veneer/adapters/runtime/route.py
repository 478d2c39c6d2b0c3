"""Routes: the adapters, with their weights, that each row or token of a batch uses.

A route is an argument of the batch, never a mode of the model. A user writes

    "sql"                                     every row
    None                                      the base
    {"sql": 0.7, "style": 0.3}                a weighted mix, every row
    ["sql", None, {"sql": 0.7, "style": 0.3}] row by row
    Route.tokens(mixes, index)                token by token, in flat or padded batches

becomes a few distinct mixes and one tensor that says which of them each row or token takes. When the model is called, the route is
tied to that call's shape (``plan.py``).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Union

import torch
from torch import Tensor

from veneer.errors import RouteError

Mix = tuple[tuple[str, float], ...]
MixLike = str | None | Mapping[str, float]
RouteLike = Union["Route", MixLike, Sequence[MixLike]]


@dataclass(frozen=True, eq=False)
class Route:
    """Distinct mixes (the empty one is the base) and, unless one holds for all, the number of each row's or token's mix.

    unit: "all", "row" or "token". repeat: how many consecutive rows each entry of a list was written for.
    """

    mixes: tuple[Mix, ...]
    index: Tensor | None = None
    unit: str = "all"
    repeat: int = 1

    @classmethod
    def parse(cls, route: RouteLike, repeat: int = 1) -> Route:
        """A route from what a user wrote. ``repeat``: consecutive rows for each entry of a list, as beams make them."""
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise RouteError(f"repeat is how many consecutive rows each entry holds for, at least 1; found {repeat!r}")
        if isinstance(route, Route):
            if repeat != 1 and route.unit != "all":
                raise RouteError("repeat is for a route that is a list; build a Route with the repeated rows or tokens")
            return route
        if route is None or isinstance(route, (str, Mapping)):
            return cls((_mix(route),))
        if not isinstance(route, Sequence):
            raise RouteError(
                f"a route is an adapter's name, None, a mix, or a list of these; found {type(route).__name__}"
            )
        if not route:
            raise RouteError("a route row by row needs at least one row; found an empty list")
        rows = [_mix(entry) for entry in route]
        number = {mix: i for i, mix in enumerate(dict.fromkeys(rows))}
        index = torch.tensor([number[mix] for mix in rows]).repeat_interleave(repeat)
        return cls(tuple(number), index, "row", repeat)

    @classmethod
    def tokens(cls, mixes: Sequence[MixLike], index: Tensor) -> Route:
        """A route token by token: token t takes ``mixes[index[t]]``; index [T] (flat order) or [B, T], whole numbers."""
        parsed = tuple(_mix(entry) for entry in mixes)
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
            found = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise RouteError(f"a token route needs a tensor of whole numbers, one a token; found {found}")
        flat = index.reshape(-1).to(device="cpu", dtype=torch.long)
        if not parsed or (flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < len(parsed)):
            span = f"{int(flat.min())} to {int(flat.max())}" if flat.numel() else "no tokens"
            raise RouteError(f"a token route points past its {len(parsed)} mixes: found {span}")
        return cls(parsed, flat, "token") if len(parsed) > 1 else cls(parsed)

    @property
    def uniform(self) -> bool:
        """True if one mix applies to every token."""
        return len(self.mixes) == 1

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every adapter that the route uses, in order of first use."""
        return tuple(dict.fromkeys(name for mix in self.mixes for name, _ in mix))

    @property
    def length(self) -> int | None:
        """Number of rows or tokens in the route, or None if it applies to all."""
        return None if self.index is None else self.index.numel()

    @cached_property
    def bytes(self) -> bytes:
        """The index as something that can be compared at once."""
        return b"" if self.index is None else self.index.numpy().tobytes()

    def select(self, keep: Tensor) -> Route:
        """The same route for the cells ``keep`` only (a head that sees some tokens), [K]."""
        return self if self.index is None else Route(self.mixes, self.index[keep.reshape(-1).cpu()], self.unit)

    def before_beams(self) -> Route:
        """The route of a batch whose rows are not repeated yet: an encoder runs before the beams are made."""
        assert self.index is not None
        return Route(self.mixes, self.index[:: self.repeat], self.unit)


def _mix(entry: MixLike) -> Mix:
    if entry is None:
        return ()
    if isinstance(entry, str):
        return ((entry, 1.0),)
    if not isinstance(entry, Mapping):
        raise RouteError(
            f"a row's route is an adapter's name, None or a mix like {{'a': 0.7, 'b': 0.3}}; found {entry!r}"
        )
    for name, weight in entry.items():
        if not isinstance(name, str) or not _is_weight(weight):
            raise RouteError(f"a mix pairs adapters' names with finite weights; found {name!r}: {weight!r}")
    return tuple((name, float(weight)) for name, weight in entry.items() if weight != 0)


def _is_weight(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)
