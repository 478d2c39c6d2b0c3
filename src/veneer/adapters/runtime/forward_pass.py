"""Forward passes: one call of the model under a route.

A `ForwardPass` holds what must be remembered of a call until its backward is over: the context that it runs under, the numbers of its
dropout masks, its DoRA norms, and the autograd nodes that it made. What calls of the same shapes share is in the plan (``plan.py``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.runtime.plan import RoutePlan, Shapes
from veneer.adapters.runtime.route import Route


class RouteContext:
    """One open `Bank.use`.

    Attributes:
        route, keep: the route, and the route of the tokens that the head receives, None if it receives all.
        training: whether adapters drop out; None follows the layers' modes.
        windows: by adapter, where the batch has a part of its tokens: (first, tokens here, tokens in all), for dropout.
        owner: the thread that opened the context.
        outer: the context around it.
        task: the backward pass in which it was opened, or -1.
        visitors: calls of the whole model that other threads are running.
        open: False once the context is left.
    """

    def __init__(self, route: Route, keep: Route | None, training: bool | None, owner: int) -> None:
        self.route = route
        self.keep = keep
        self.training = training
        self.windows: Mapping[str, tuple[int, int, int]] = {}
        self.owner = owner
        self.outer: RouteContext | None = None
        self.task = -1
        self.visitors = 0
        self.open = True


class ForwardPass:
    """One call of the model, or of a part of it that is called alone, under a route.

    Attributes:
        context: the `use` that it runs under, None outside any.
        top: path of the module that was called ("" is the whole model).
        grad: whether gradients were enabled when it began.
        lasting: True until the call returns.
        draws: number of this pass in each adapter's dropout stream, drawn when it is first needed.
        norms: constant DoRA norms by (adapter, site), until the call returns.
        versions: version of each adapter of the route, None for one that is trained (``frozen.py``); looked up once.
        frozen: the same as a tuple if all adapters are frozen.
    """

    def __init__(self, context: RouteContext | None, plan: RoutePlan, top: str) -> None:
        self.context = context
        self.plan = plan
        self.route = plan.route
        self.training = None if context is None else context.training
        self.top = top
        self.grad = torch.is_grad_enabled()
        self.linked = False
        self.lasting = True
        self.draws: dict[str, int] = {}
        self.norms: dict[tuple[str, str], Tensor] = {}
        self.versions: dict[str, int | None] | None = None
        self.frozen: tuple[int, ...] | None = None
        self.thread = threading.get_ident()
        self.first_node = _next_node()
        self.end_node: int | None = None

    def made(self, node: int) -> bool:
        """True if an autograd node, by its number, was made in this pass (or just before: by a checkpoint around the call)."""
        if self.first_node <= node < (math.inf if self.end_node is None else self.end_node):
            return True
        return not self.grad and node == self.first_node - 1

    def computes_like(self, other: ForwardPass) -> bool:
        """True if running a layer under either pass gives the same result."""
        a, b = self.route, other.route
        same = a is b or (a.uniform and b.uniform and a.mixes == b.mixes)
        return same and self.draws == other.draws and self.training == other.training

    def part(self, plan: RoutePlan) -> ForwardPass:
        """A pass for some of the rows, inside this one: it has the route of ``plan``, and this one's norms and dropout masks."""
        made = ForwardPass(self.context, plan, self.top)
        made.grad, made.linked, made.lasting = self.grad, self.linked, self.lasting
        made.draws, made.norms = self.draws, self.norms
        return made

    def close(self) -> None:
        """End the call."""
        self.lasting = False
        self.norms = {}
        if self.end_node is None:
            self.end_node = _next_node()


@dataclass(eq=False)
class SharedOutputs:
    """Outputs of layers that were computed together with the first of them, until the others are called.

    x, current: the input and the pass that they were computed for. key: tells this input and its state from all others.
    """

    x: Tensor
    current: ForwardPass
    key: tuple[int, ...]
    outputs: dict[str, Tensor]


def _next_node() -> int:
    """The number that autograd will give to the next node which this thread makes."""
    autograd: Any = torch.autograd
    number: int = autograd._get_sequence_nr()
    return number


def input_shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes:
    """Shapes of a call's tensors: (B, T) of token ids, (B, ...) of anything else."""
    return tuple(tuple(value.shape) for value in tensors_in((*args, *kwargs.values())) if value.dim() >= 1)


def tensors_in(values: Any, depth: int = 2) -> Iterator[Tensor]:
    """Tensors among a call's arguments, looking into the lists, tuples and mappings of a batch but not into other objects."""
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, (list, tuple, Mapping)):
            yield from tensors_in(value, depth - 1)
