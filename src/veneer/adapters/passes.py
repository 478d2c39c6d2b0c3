"""Passes: one call of the model under a route.

A pass ties the route to the call's shape. Each layer asks it which of its cells an adapter acts on, and layers of the same shape
share the answer. How the rows of the batch lie in a layer's input is what the probe saw there (``probe.py``):

    rows      [B, ...]       first size is the number of rows
    tokens    [B*n]          rows behind each other, n cells each
    blocks    [B*n, m, ...]  rows behind each other, cut into blocks (windows of an image)
    constant  anything else  cannot be matched with rows or tokens

Boundary: index arithmetic. What an adapter does with its cells is the host's business.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.route import Route
from veneer.errors import RouteError

Part = tuple[str, Tensor | None, Tensor | float]
Extents = tuple[tuple[int, ...], ...]


class Lease:
    """One open `use`: its route, what the head sees, whether adapters drop out, the thread that owns it.

    outer: the `use` around it. task: the backward pass that it was opened in, or -1. guests: calls of the whole model that other
    threads are in. open: False once its context is left.
    """

    def __init__(self, route: Route, keep: Route | None, training: bool | None, owner: int) -> None:
        self.route = route
        self.keep = keep
        self.training = training
        self.owner = owner
        self.outer: Lease | None = None
        self.task = -1
        self.guests = 0
        self.open = True


class Pass:
    """One call of the model, or of a part of it that is called alone, under a route.

    lease: the `use` that it runs under, None outside. top: path of the module that was called ("" is the whole model).
    extents: leading sizes of the call's inputs. grad: whether gradients were wanted when it began. draws: the number of this pass in
    each adapter's dropout stream, drawn when it is first needed. norms: DoRA norms, while the pass lasts.
    """

    def __init__(self, lease: Lease | None, route: Route, extents: Extents, top: str) -> None:
        self.lease = lease
        self.route = route
        self.training = None if lease is None else lease.training
        self.extents = extents
        self.top = top
        self.grad = torch.is_grad_enabled()
        self.linked = False
        self.lasting = True
        self.draws: dict[str, int] = {}
        self.norms: dict[tuple[str, str], Tensor] = {}
        self.thread = threading.get_ident()
        self.first_node = _next_node()
        self.end_node: int | None = None
        self.apart = all(len(mix) <= 1 for mix in route.mixes)
        """Whether no cell takes more than one adapter."""
        self.spans: dict[int, slice] = {}
        """The cells of a part as a slice, by the id of their tensor, where they stand behind each other."""
        self.plans: dict[tuple[object, ...], Any] = {}
        """What the fast form works out once a pass: which parts it takes, and how they are bundled (see ``fused.py``)."""
        self.generations: dict[str, int | None] = {}
        """The state of each frozen adapter (see ``folded.py``)."""
        self._parts: dict[tuple[object, ...], list[Part]] = {}

    def made(self, node: int) -> bool:
        """Whether an autograd node, by its number, was made in this pass (or just before: by a checkpoint around the call)."""
        if self.first_node <= node < (math.inf if self.end_node is None else self.end_node):
            return True
        return not self.grad and node == self.first_node - 1

    def close(self) -> None:
        """The call is over."""
        self.lasting = False
        self.norms.clear()
        if self.end_node is None:
            self.end_node = _next_node()

    def parts(self, lead: tuple[int, ...], device: torch.device, site: str, is_head: bool, layout: str) -> list[Part]:
        """(adapter, its cells or None for all, weight) at a layer whose input has the leading sizes ``lead``.

        Raises RouteError where the sizes cannot be matched with the route and more than one mix is in play.
        """
        if self.route.uniform:
            return [(name, None, weight) for name, weight in self.route.mixes[0]]
        key = (lead, is_head, layout, device)
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = self._compile(self._cells(lead, site, is_head, layout), device)
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
            if where is not None and last - first + 1 == rows.numel():
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
                keep = None if self.lease is None else self.lease.keep
                if is_head and keep is not None and count == keep.length:
                    assert keep.index is not None
                    return keep.index
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


def _next_node() -> int:
    """The number that autograd will give to the next node which this thread makes."""
    autograd: Any = torch.autograd
    number: int = autograd._get_sequence_nr()
    return number


def extents_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Extents:
    """Sizes of a call's tensors: (B, T) of token ids, (B, ...) of anything else."""
    return tuple(tuple(value.shape) for value in tensors_in((*args, *kwargs.values())) if value.dim() >= 1)


def tensors_in(values: Any, depth: int = 2) -> Iterator[Tensor]:
    """Tensors among a call's arguments, looking into the lists, tuples and mappings of a batch but not into other objects."""
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, (list, tuple, Mapping)):
            yield from tensors_in(value, depth - 1)
