"""Passes: one call of the model under a route.

A pass is what must be remembered of a call until its backward is over: the lease that it runs under, the numbers of its dropout masks,
its DoRA norms, the autograd nodes that it made. What its route comes to in a layer, the next call that is alike may share (``chart.py``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.runtime.mapping import Chart, Extents
from veneer.adapters.runtime.route import Route


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

    lease: the `use` that it runs under, None outside. chart: what its route comes to.
    top: path of the module that was called ("" is the whole model).
    extents: leading sizes of the call's inputs. grad: whether gradients were wanted when it began. draws: the number of this pass in
    each adapter's dropout stream, drawn when it is first needed. norms: DoRA norms, while the pass lasts.
    """

    def __init__(self, lease: Lease | None, chart: Chart, extents: Extents, top: str) -> None:
        self.lease = lease
        self.chart = chart
        self.route = chart.route
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
        self.generations: dict[str, int | None] = {}
        """The state of each frozen adapter (see ``folded.py``)."""
        self.states: tuple[int, ...] | bool | None = False
        """The states of all adapters of the route, None where one is trained; False before anybody has looked."""

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
