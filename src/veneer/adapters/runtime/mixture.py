"""The forwards of a mixture's modules while adapters act on them: a module around separate experts, and a router.

A router picks the tokens of each expert, so the order of the batch's rows in the input of an expert that is a module of its own is not
known. Under a route with several mixes, the module around the experts is called once for each mix, with its rows alone: everything inside
then runs under one mix (`AdaptedMixture`). The rows are the same in all, so the products are no more; in smaller calls, they may round
otherwise. The output of a row must not depend on other rows. Stacked experts need no such calls: their forward is ours (``experts.py``).

A router that also chooses the experts runs its own forward, in which its scores are changed (`AdaptedRouter`, ``layers/routers.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.routers import NO_PRODUCT, ScoreProducts
from veneer.adapters.layers.site import Site
from veneer.adapters.runtime.forward import AdaptedForward
from veneer.adapters.runtime.forward_pass import ForwardPass
from veneer.adapters.runtime.layer import AdaptedLayer
from veneer.adapters.runtime.plain_path import plain_forward
from veneer.adapters.runtime.plan import RowsOfMix
from veneer.adapters.runtime.runtime import Runtime
from veneer.adapters.runtime.tracker import ThreadState
from veneer.errors import AdapterError, RouteError


class AdaptedMixture(AdaptedForward):
    """The forward of a module around separate experts while adapters act inside it.

    Attributes:
        members: the adapted layers of each adapter in here.
    """

    def __init__(self, site: Site, runtime: Runtime, inner: Callable[..., Tensor] | None) -> None:
        super().__init__(site, runtime, inner)
        self.members: dict[str, set[str]] = {}

    def admit(self, site: Site, adapter: Adapter) -> None:
        """Note a layer on which an adapter acts."""
        super().admit(site, adapter)
        self.members.setdefault(adapter.name, set()).add(site.name)

    def release(self, site: Site, name: str) -> None:
        """Forget such a layer."""
        layers = self.members.get(name, set())
        layers.discard(site.name)
        if not layers:
            self.members.pop(name, None)
            super().release(site, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracker = self.runtime.tracker
        current = tracker.enter(self.site.name, args, kwargs, opens=False)
        if (
            current is None
            or current.plan.uniform is not None
            or current.plan.adapters.keys().isdisjoint(self.adapters)
        ):
            return self.base_call(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            raise self._unmatched("is not given a tensor first")
        shape = self.site.layer_kind.batch_shape(self.site.module, x)
        parts = current.plan.by_mix(shape, x.device, self.site, self.adapters)
        outputs = []
        for part in parts:
            with _inside(tracker.state, current, current.part(part.plan)):
                if len(parts) == 1:
                    return self.base_call(*args, **kwargs)
                chosen = {key: self._chosen(value, shape, part) for key, value in kwargs.items()}
                outputs.append(self.base_call(*(self._chosen(value, shape, part) for value in args), **chosen))
        return self._joined(outputs, shape, parts) if outputs else self.base_call(*args, **kwargs)

    def _chosen(self, value: Any, shape: tuple[int, ...], part: RowsOfMix) -> Any:
        """A part's rows of an argument."""
        if isinstance(value, (list, tuple)):
            return _like(value, [self._chosen(one, shape, part) for one in value])
        if not isinstance(value, Tensor):
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            raise self._unmatched(f"is given an object of type {type(value).__name__}")
        if not value.dim():
            return value
        if part.rows is not None and len(value) in (1, shape[0]):
            return value if len(value) == 1 else value.index_select(0, part.rows)
        if len(value) == math.prod(shape):
            return value.index_select(0, part.tokens)
        if value.shape[: len(shape)] == shape:
            found = value.flatten(0, len(shape) - 1).index_select(0, part.tokens)
            return found.view(*[1] * (len(shape) - 1), *found.shape)
        raise self._unmatched(f"is given a tensor of {' x '.join(map(str, value.shape))}")

    def _joined(self, values: Sequence[Any], shape: tuple[int, ...], parts: Sequence[RowsOfMix]) -> Any:
        """The outputs of all parts in the order of the input."""
        first = values[0]
        if first is None:
            return None
        if isinstance(first, (list, tuple)):
            return _like(first, [self._joined(one, shape, parts) for one in zip(*values, strict=True)])
        if not all(isinstance(value, Tensor) and value.dim() for value in values):
            raise self._unmatched(
                f"returns {type(first).__name__ if not isinstance(first, Tensor) else 'a single number'}"
            )
        tokens = [part.tokens for part in parts]
        rows = [part.rows for part in parts if part.rows is not None]
        if rows and all(len(value) == len(own) for value, own in zip(values, rows, strict=True)):
            return _in_order(values, rows)
        if all(len(value) == len(own) for value, own in zip(values, tokens, strict=True)):
            return _in_order(values, tokens)
        ones = (1,) * (len(shape) - 1)
        if all(value.shape[: len(shape)] == (*ones, len(own)) for value, own in zip(values, tokens, strict=True)):
            whole = _in_order([value.flatten(0, len(shape) - 1) for value in values], tokens)
            return whole.view(*shape, *whole.shape[1:])
        raise self._unmatched(f"returns a tensor of {' x '.join(map(str, first.shape))}")

    def _unmatched(self, found: str) -> RouteError:
        return RouteError(
            f"{self.site.name or 'the model'} holds experts and {found}, which cannot be divided into the rows of several mixes; "
            "route the whole batch one way, or leave its experts out of the adapters that take part"
        )


class Scores(AdaptedLayer):
    """The product inside a router, as a linear layer."""

    def base_call(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = args
        bias = self.site.layer_kind.bias(self.site.module)
        return F.linear(x, self.site.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class AdaptedRouter(AdaptedForward):
    """The forward of a router while adapters act on its scores."""

    def __init__(self, site: Site, runtime: Runtime, inner: Callable[..., Tensor] | None) -> None:
        super().__init__(site, runtime, inner)
        self.scores = Scores(site, runtime, None)
        self.scores.adapters = self.adapters

    def _output(self, current: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan, site = current.plan, self.site
        if plan.adapters.keys().isdisjoint(self.adapters):
            return self.base_call(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        assignments = plan.uniform
        if assignments is None:
            assignments = plan.assignments(site.layer_kind.batch_shape(site.module, x), x.device, site)
        acting = [one for one in assignments if one.adapter in self.adapters]
        seen = False

        def change(_: Site, x: Tensor, y: Tensor) -> Tensor:
            nonlocal seen
            seen = True
            return plain_forward(self.scores, current, acting, x, y) if acting else y

        with ScoreProducts([site], change):
            out = self.base_call(*args, **kwargs)
        if not seen:
            raise AdapterError(f"{site.name or 'the model'}: {NO_PRODUCT}")
        return out


@contextmanager
def _inside(state: ThreadState, current: ForwardPass, part: ForwardPass) -> Iterator[None]:
    """Run calls under a part of the pass that this thread is in, forward or again in backward."""
    keys = [key for key in ("current", "recomputed") if getattr(state, key) is current]
    for key in keys:
        setattr(state, key, part)
    try:
        yield
    finally:
        part.close()
        for key in keys:
            setattr(state, key, current)


def _like(given: Any, values: list[Any]) -> Any:
    """A list, tuple or named tuple as the given one is."""
    return type(given)(*values) if hasattr(given, "_fields") else type(given)(values)


def _in_order(values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors at their places in one."""
    return torch.cat([*values]).index_select(0, torch.cat([*places]).argsort())
