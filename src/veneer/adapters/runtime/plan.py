"""Plans: the part of a forward that depends only on the route and on shapes, computed once and shared by the next calls.

A decoding step has the shapes of the step before it, so the search for each adapter's tokens and for a grouping is done once. A
`RoutePlan` belongs to one (route, input shapes) and holds

    assignments   by layer input shape: each adapter's tokens and weight (`Assignment`)
    groups        which assignments are computed together (``grouping.py``)
    calls         where nothing is trained: what each site computes with (``fast_path.py``)
    rows          the rows of each mix, where they are computed apart (``mixture.py``)

How the rows of a batch lie in a layer's input was found by the dry run (``layers/dry_run.py``):

    rows      [B, ...]       the first size is the number of rows
    tokens    [B*n]          rows one after the other, n tokens each
    blocks    [B*n, m, ...]  rows one after the other, cut into blocks (windows of an image)
    constant  anything else  cannot be matched with rows or tokens

Plans are dropped when an adapter joins or leaves the bank.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site
from veneer.adapters.runtime.route import Route
from veneer.errors import RouteError

Shapes = tuple[tuple[int, ...], ...]
_PLANS = 4
"""Number of plans that are kept: those of the sequences being decoded, and those that came just before."""


class Assignment(NamedTuple):
    """One adapter's tokens in a layer's input.

    tokens: their indices [n] on the layer's device, None for all. weight: a float, or a tensor [n]. span: the same tokens as a slice,
    where they are consecutive. fast: whether the fast path supports the adapter's method with this weight. on_cpu: the tokens on the CPU.
    """

    adapter: str
    tokens: Tensor | None
    weight: float | Tensor
    span: slice | None
    fast: str
    on_cpu: Tensor | None = None


class RowsOfMix(NamedTuple):
    """The rows of a layer's input that use one mix, to be computed apart from the others.

    plan: the mix as the route of all of them. rows: their indices [n] in the first dimension, None where the tokens of a row differ.
    tokens: the indices of their tokens among all.
    """

    plan: RoutePlan
    rows: Tensor | None
    tokens: Tensor


class RoutePlan:
    """A route for calls whose inputs have these shapes. ``keep`` is the route of the tokens that the head receives, or None for all."""

    def __init__(self, route: Route, shapes: Shapes, keep: Route | None, adapters: Mapping[str, Adapter]) -> None:
        self.route = route
        self.shapes = shapes
        self.keep = keep
        self.adapters = {name: adapters[name] for name in route.names}
        self.exclusive = all(len(mix) <= 1 for mix in route.mixes)
        """True if no token uses more than one adapter."""
        self.has_overrides = any(adapter.overrides for adapter in self.adapters.values())
        self.drops = any(adapter.method.dropout for adapter in self.adapters.values())
        self.uniform: tuple[Assignment, ...] | None = None
        """The assignments of every layer, where one mix holds for all tokens."""
        if route.uniform:
            self.uniform = tuple(self._assignment(name, None, weight) for name, weight in route.mixes[0])
        self.groups: dict[tuple[object, ...], Any] = {}
        self.calls: dict[str, Any] = {}
        self._assignments: dict[tuple[object, ...], tuple[Assignment, ...]] = {}
        self._rows: dict[tuple[object, ...], tuple[RowsOfMix, ...]] = {}

    def assignments(self, batch_shape: tuple[int, ...], device: torch.device, site: Site) -> tuple[Assignment, ...]:
        """Each adapter's tokens at a layer whose input has the leading sizes ``batch_shape``.

        Raises RouteError where the sizes cannot be matched with the route and more than one mix is in play.
        """
        key = (batch_shape, site.is_head, site.layout, device)
        found = self._assignments.get(key)
        if found is None:
            # Two threads that arrive at once must go on with the same tensors: groups are found by their ids.
            found = self._assignments.setdefault(key, self._compile(self._mix_of_token(batch_shape, site), device))
        return found

    def by_mix(
        self, batch_shape: tuple[int, ...], device: torch.device, site: Site, acting: Collection[str]
    ) -> tuple[RowsOfMix, ...]:
        """The rows of each mix of the adapters ``acting`` at a module whose input has the leading sizes ``batch_shape``.

        Raises RouteError as `assignments` does.
        """
        key = (batch_shape, site.layout, device, frozenset(acting))
        found = self._rows.get(key)
        if found is None:
            here = [tuple(pair for pair in mix if pair[0] in acting) for mix in self.route.mixes]
            number = {mix: i for i, mix in enumerate(dict.fromkeys(here))}
            mix_N = torch.tensor([number[mix] for mix in here])[self._mix_of_token(batch_shape, site)]
            mix_BT = mix_N.view(batch_shape[0], -1)
            by_row = bool((mix_BT == mix_BT[:, :1]).all())
            parts = []
            for mix, i in number.items():
                rows = (mix_BT[:, 0] == i).nonzero().squeeze(1).to(device) if by_row else None
                tokens = (mix_N == i).nonzero().squeeze(1).to(device)
                if len(tokens):
                    parts.append(RowsOfMix(RoutePlan(Route((mix,)), self.shapes, None, self.adapters), rows, tokens))
            found = self._rows.setdefault(key, tuple(parts))
        return found

    def _assignment(
        self,
        name: str,
        tokens: Tensor | None,
        weight: float | Tensor,
        span: slice | None = None,
        device: torch.device | None = None,
    ) -> Assignment:
        fast = self.adapters[name].method.fast_support(weight, exclusive=self.exclusive)
        there = tokens if tokens is None or device is None else tokens.to(device)
        return Assignment(name, there, weight, span, fast, tokens)

    def _compile(self, mix_N: Tensor, device: torch.device) -> tuple[Assignment, ...]:
        found: list[Assignment] = []
        for name in self.route.names:
            table = torch.tensor([dict(mix).get(name, 0.0) for mix in self.route.mixes], dtype=torch.float64)
            weight_N = table[mix_N]
            tokens = weight_N.nonzero().squeeze(1)
            if tokens.numel() == 0:
                continue
            weights = weight_N[tokens]
            weight = float(weights[0]) if bool((weights == weights[0]).all()) else weights.to(device)
            first, last = int(tokens[0]), int(tokens[-1])
            everywhere = tokens.numel() == mix_N.numel()
            consecutive = not everywhere and last - first + 1 == tokens.numel()
            span = slice(first, last + 1) if consecutive else None
            found.append(self._assignment(name, None if everywhere else tokens, weight, span, device))
        return tuple(found)

    def _mix_of_token(self, batch_shape: tuple[int, ...], site: Site) -> Tensor:
        """The mix number of each token [prod(batch_shape)]."""
        index, layout = self.route.index, site.layout
        assert index is not None
        count = math.prod(batch_shape)
        if count == 0:
            return index[:0]
        if not layout and all(shape[0] > 1 for shape in self.shapes):
            raise RouteError(
                f"{site.name}: the order of the batch's rows in this layer's input is not known, so a route of {index.numel()} "
                f"{self.route.unit}s cannot be matched with it; give attach(model, example=...) a batch of two rows or more"
            )
        if layout != "constant":
            if self.route.unit == "token":
                if count == index.numel() and layout != "blocks":
                    return index
                if site.is_head and self.keep is not None and count == self.keep.length:
                    assert self.keep.index is not None
                    return self.keep.index
            else:
                per_row = self._tokens_per_row(batch_shape, index.numel(), layout)
                if per_row:
                    return index.repeat_interleave(per_row)
        shape = " x ".join(map(str, batch_shape)) or "no"
        raise RouteError(
            f"{site.name}: the layer's input has leading sizes {shape}, which cannot be matched with a route of {index.numel()} "
            f"{self.route.unit}s; route the whole batch one way, or leave this site out of the adapters that take part"
        )

    def _tokens_per_row(self, batch_shape: tuple[int, ...], rows: int, layout: str) -> int:
        """Number of consecutive tokens that belong to one row, or 0 where the sizes do not determine it."""
        count = math.prod(batch_shape)
        if count % rows:
            return 0
        if batch_shape[0] == rows or (layout == "blocks" and batch_shape[0] % rows == 0):
            return count // rows
        # Rows one after the other in one dimension: only if none is shortened, as in models that drop padding.
        flat = layout == "tokens" and len(batch_shape) == 1
        return count // rows if flat and count // rows in self._row_lengths(rows) else 0

    def _row_lengths(self, rows: int) -> set[int]:
        """Numbers of tokens that a row may have, by the call's inputs."""
        found = [shape[1:] for shape in self.shapes if len(shape) >= 2 and shape[0] == rows]
        return {math.prod(sizes) for sizes in found} | {sizes[0] for sizes in found}


class PlanCache:
    """The plans of the last few routes of one bank."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = adapters
        self._plans: OrderedDict[tuple[object, ...], RoutePlan] = OrderedDict()
        self._lock = threading.Lock()

    def plan(self, route: Route, shapes: Shapes, keep: Route | None) -> RoutePlan:
        """The plan of a route in calls with these input shapes."""
        key = (route.mixes,) if route.uniform else (route.mixes, route.unit, route.bytes, shapes, keep and keep.bytes)
        with self._lock:
            found = self._plans.get(key)
            if found is None:
                found = self._plans[key] = RoutePlan(route, shapes, keep, self._adapters)
                while len(self._plans) > _PLANS:
                    self._plans.popitem(last=False)
            else:
                self._plans.move_to_end(key)
        return found

    def clear(self) -> None:
        """Drop all plans: adapters have joined or left."""
        with self._lock:
            self._plans.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return (PlanCache, (self._adapters,))
