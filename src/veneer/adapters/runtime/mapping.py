"""Charts: what a route comes to in calls of certain sizes, worked out once and kept for the next calls that are alike.

A mixed batch costs the adapters' products, and the work of finding out who has which cells and how they are bundled. The second depends
on the route and on the sizes of the call alone, so a step of decoding, which looks like the step before it, finds it done. A chart holds

    parts       for inputs of some leading sizes: (adapter, its cells or None for all, weight)
    plans       which parts the fast form takes, and how they are bundled (``fused.py``)
    calls       where nothing is trained: what each site computes with (``fused.py``)

How the rows of a batch lie in a layer's input is what the probe saw there (``probe.py``):

    rows      [B, ...]       first size is the number of rows
    tokens    [B*n]          rows behind each other, n cells each
    blocks    [B*n, m, ...]  rows behind each other, cut into blocks (windows of an image)
    constant  anything else  cannot be matched with rows or tokens

Boundary: index arithmetic. What an adapter does with its cells is the host's business. Adapters that join or leave the bank end all
charts.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.runtime.route import Route
from veneer.errors import RouteError

Part = tuple[str, Tensor | None, Tensor | float]
Extents = tuple[tuple[int, ...], ...]
_KEPT = 4
"""Charts of so many routes are kept: those that decode, and those that came just before."""


class Chart:
    """What a route comes to in calls whose inputs have the sizes ``extents``. keep: the route of what the head sees, or None for all."""

    def __init__(self, route: Route, extents: Extents, keep: Route | None) -> None:
        self.route = route
        self.extents = extents
        self.keep = keep
        self.apart = all(len(mix) <= 1 for mix in route.mixes)
        """Whether no cell takes more than one adapter."""
        self.spans: dict[int, slice] = {}
        """The cells of a part as a slice, by the id of their tensor, where they stand behind each other."""
        self.plans: dict[tuple[object, ...], Any] = {}
        self.calls: dict[str, Any] = {}
        self.owned: bool | None = None
        """Whether an adapter of the route has values of its own somewhere, once somebody has looked."""
        self._parts: dict[tuple[object, ...], list[Part]] = {}
        self._alive: list[Tensor] = []

    def parts(self, lead: tuple[int, ...], device: torch.device, site: str, is_head: bool, layout: str) -> list[Part]:
        """(adapter, its cells or None for all, weight) at a layer whose input has the leading sizes ``lead``.

        Raises RouteError where the sizes cannot be matched with the route and more than one mix is in play.
        """
        if self.route.uniform:
            return [(name, None, weight) for name, weight in self.route.mixes[0]]
        key = (lead, is_head, layout, device)
        found = self._parts.get(key)
        if found is None:
            # Where two threads come here at once, both shall go on with the same tensors: plans know them by their ids.
            found = self._parts.setdefault(key, self._compile(self._cells(lead, site, is_head, layout), device))
        return found

    def _compile(self, cells: Tensor, device: torch.device) -> list[Part]:
        parts: list[Part] = []
        for name in self.route.names:
            table = torch.tensor([dict(mix).get(name, 0.0) for mix in self.route.mixes], dtype=torch.float64)
            weight_N = table[cells]
            rows = weight_N.nonzero().squeeze(1)
            if rows.numel() == 0:
                continue
            weights = weight_N[rows]
            same = bool((weights == weights[0]).all())
            everywhere = rows.numel() == cells.numel()
            where = None if everywhere else rows.to(device)
            first, last = int(rows[0]), int(rows[-1])
            if where is not None:
                self._alive.append(where)
                if last - first + 1 == rows.numel():
                    self.spans[id(where)] = slice(first, last + 1)
            parts.append((name, where, float(weights[0]) if same else weights.to(device)))
        return parts

    def _cells(self, lead: tuple[int, ...], site: str, is_head: bool, layout: str) -> Tensor:
        """The mix number of each cell [prod(lead)]."""
        index = self.route.index
        assert index is not None
        count = math.prod(lead)
        if count == 0:
            return index[:0]
        if not layout and all(extent[0] > 1 for extent in self.extents):
            raise RouteError(
                f"{site}: how the rows of a batch lie in this layer's input is not known, so a route of {index.numel()} "
                f"{self.route.unit}s cannot be matched with it; give attach(model, example=...) a batch of two rows or more"
            )
        if layout != "constant":
            if self.route.unit == "token":
                if count == index.numel() and layout != "blocks":
                    return index
                if is_head and self.keep is not None and count == self.keep.length:
                    assert self.keep.index is not None
                    return self.keep.index
            else:
                per_row = self._per_row(lead, index.numel(), layout)
                if per_row:
                    return index.repeat_interleave(per_row)
        shape = " x ".join(map(str, lead)) or "no"
        raise RouteError(
            f"{site}: the layer's input has leading sizes {shape}, which cannot be matched with a route of {index.numel()} "
            f"{self.route.unit}s; route the whole batch one way, or leave this site out of the adapters that take part"
        )

    def _per_row(self, lead: tuple[int, ...], rows: int, layout: str) -> int:
        """Consecutive cells that belong to one row, or 0 where the layer's sizes do not say."""
        count = math.prod(lead)
        if count % rows:
            return 0
        if lead[0] == rows or (layout == "blocks" and lead[0] % rows == 0):
            return count // rows
        # Rows behind each other in one line: only if none is cut short, as models do that leave padding out.
        in_line = layout == "tokens" and len(lead) == 1
        return count // rows if in_line and count // rows in self._lengths(rows) else 0

    def _lengths(self, rows: int) -> set[int]:
        """How many cells a row may have, by the call's inputs."""
        own = [extent[1:] for extent in self.extents if len(extent) >= 2 and extent[0] == rows]
        return {math.prod(sizes) for sizes in own} | {sizes[0] for sizes in own}


class Charts:
    """The charts of the last few routes of one bank."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], Chart] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, route: Route, extents: Extents, keep: Route | None) -> Chart:
        """The chart of a route in calls of these sizes."""
        key = (route.mixes,) if route.uniform else (route.mixes, route.unit, route.bytes, extents, keep and keep.bytes)
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = Chart(route, extents, keep)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(key)
        return found

    def clear(self) -> None:
        """Adapters have joined or left."""
        with self._lock:
            self._kept.clear()
