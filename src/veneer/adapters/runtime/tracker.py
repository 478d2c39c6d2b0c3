"""RouteTracker: who uses the model now, and under which route each of its calls runs.

`Bank.use` takes a lease on the model for one route. A call of the whole model, or of a part of it outside any such call, is a pass:
it begins when the first module at or around a site is entered and belongs to the lease that is open then. One thread owns the lease;
threads that it starts run under it too, since generation often does. What would silently fall back to the base or onto another
route, because a lease ended or changed under a running call, is an error.

The reentrant kind of activation checkpointing runs its forward without gradients and cuts the graph if nothing that enters it
requires one: with a frozen base nothing below would ever train. That is seen here, and refused.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.adapters.runtime.forward_pass import Lease, Pass, extents_of, tensors_in
from veneer.adapters.runtime.mapping import Charts
from veneer.adapters.runtime.recompute import Memory, Moment, State, backward_moment
from veneer.adapters.runtime.route import Route
from veneer.errors import RouteError

if TYPE_CHECKING:
    from veneer.adapters.bank import Bank

BASE = Route(((),))
_RECENT = 64
"""So many passes that want gradients are known by the numbers of their autograd nodes."""


class RouteTracker:
    """The lease on one bank's model, and the passes that run under it."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.memory = Memory()
        self.state = State()
        self.recent: deque[Pass] = deque(maxlen=_RECENT)
        self.charts = Charts()
        self.lease: Lease | None = None
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, route: Route, keep: Tensor | None, training: bool | None) -> Iterator[None]:
        """Run every call of the model inside this context under ``route``; what was before comes back after it."""
        me = threading.get_ident()
        lease = Lease(route, None if keep is None else route.select(keep), training, me)
        moment = backward_moment()
        lease.task = -1 if moment is None else moment[0]
        state = self.state
        with self._lock:
            outer = self.lease
            if outer is not None and outer.owner != me:
                raise RouteError(
                    "another thread's route is active on this bank; one model runs under one route at a time: "
                    "put the rows into one batch with a route row by row, or wait for it to end"
                )
            lease.outer = outer
            self.lease = lease
        before = (state.current, state.around)
        try:
            yield
        finally:
            with self._lock:
                self.lease = outer
                lease.open = False
            state.current, state.around = before
        if lease.guests:
            raise RouteError(
                "the context of a route was left while another thread was still running the model under it; wait for the "
                "thread (thread.join()) inside the context"
            )

    def names_in_use(self) -> set[str]:
        """Adapters of the open `use` and of those around it."""
        found: set[str] = set()
        lease = self.lease
        while lease is not None:
            found.update(lease.route.names)
            lease = lease.outer
        return found

    # Calls of the model

    def enter(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, opens: bool = True) -> Pass | None:
        """A module at or around a site is entered: the pass that it runs under, or None where hosts must stand aside.

        opens: whether the module's call is a pass where none is running. Whoever enters such a module must `leave` it. In backward
        the pass is that of the forward which is run again, or None if it is not known (yet).
        """
        state = self.state
        if state.muted:
            return None
        moment = self._moment()
        if moment is not None:
            return self._again(path, args, kwargs, moment)
        current = state.current
        begins = opens and (current is None or path == current.top or self._changed(current))
        if begins:
            current = self._begin(path, args, kwargs)
        if current is None:
            return None
        if torch.is_grad_enabled():
            x = _first(args, kwargs)
            if x is not None:
                self.memory.note(x, current)
        elif (begins or current.grad) and not torch.is_inference_mode_enabled():
            x = _first(args, kwargs)
            if x is not None:
                self.memory.note(x, current)
                if current.grad and not current.linked and x.is_floating_point():
                    self._refuse_cut(path, x, current)
        return current

    def leave(self, path: str) -> bool:
        """A module is left, after an exception too. Returns whether its call was a pass of its own."""
        state = self.state
        ended = state.current
        if ended is None or ended.top != path or state.muted or self._moment() is not None:
            return False
        ended.close()
        if ended.lease is not None and ended.lease.owner != threading.get_ident():
            with self._lock:
                ended.lease.guests -= 1
        state.current, state.around = state.around[-1], state.around[:-1]
        return True

    def _begin(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        state, lease = self.state, self.lease
        if lease is None:
            if state.visited is not None:
                raise RouteError(
                    "the route under which this thread ran the model is over, and none is open now; wait for the thread "
                    "(thread.join()) inside the context, or open bank.use(None) here to go on with the base"
                )
        else:
            state.visited = None if lease.owner == threading.get_ident() else lease
        extents = extents_of(args, kwargs)
        route = BASE if lease is None else lease.route
        if route.repeat > 1:
            rows = {size[0] for size in extents}
            if route.length not in rows and route.before_beams().length in rows:
                route = route.before_beams()
        if route.unit == "row" and extents and all(size[0] != route.length for size in extents):
            raise RouteError(
                f"the route has {route.length} rows, the batch has {extents[0][0]}; give one entry a row "
                "(beam search repeats each row num_beams times: use(..., repeat=num_beams))"
            )
        if not path and not route.uniform:
            self.bank.lookout.find_rows(args, kwargs)
        begun = Pass(lease, self.charts.of(route, extents, None if lease is None else lease.keep), extents, path)
        if lease is not None and state.visited is not None:
            with self._lock:
                lease.guests += 1
        state.current, state.around = begun, (*state.around, state.current)
        if begun.grad:
            self.recent.append(begun)
        return begun

    def _changed(self, current: Pass) -> bool:
        """Whether a `use` was opened inside the call that this thread is in.

        Raises RouteError if the one that the call runs under was left, by the thread that owns it.
        """
        if current.lease is self.lease:
            return False
        if current.lease is not None and not current.lease.open:
            raise RouteError(
                "the context of a route was left while this call of the model was still running under it; wait for the "
                "thread (thread.join()) inside the context"
            )
        return self.lease is not None and self.lease.owner == threading.get_ident()

    def _moment(self) -> Moment | None:
        """The moment of backward in which this thread runs layers again; a `use` that was opened in backward is no such thing."""
        moment = backward_moment()
        return None if moment is None or (self.lease is not None and self.lease.task == moment[0]) else moment

    def _again(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], moment: Moment) -> Pass | None:
        state = self.state
        x = _first(args, kwargs)
        if state.moment != moment:
            found = None if x is None else self.memory.recall(x, path, moment[1])
            if found is None:
                # Nodes are counted thread by thread, so their numbers tell only a backward in the thread of its forward.
                here = [one for one in self.recent if one.thread == threading.get_ident() and one.made(moment[1])]
                if not here:
                    return None
                found = max(here, key=lambda one: one.first_node)
            state.replay, state.moment = found, moment
        elif x is not None and state.replay is not None:
            # A checkpoint inside a checkpoint: its own second run will look for this tensor.
            self.memory.note(x, state.replay)
        return state.replay

    def at_site(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass | None:
        """`enter` for a site itself, where adapters act.

        Raises RouteError where a layer runs again in backward and its route cannot be known.
        """
        current = self.enter(path, args, kwargs)
        if current is None and not self.state.muted:
            raise RouteError(
                f"{path or 'the model'} runs again in backward (activation checkpointing), and the route of its forward cannot be "
                "found; checkpoint whole blocks of the model on the tensors that they are given, or call the model without "
                "checkpointing"
            )
        return current

    def _refuse_cut(self, path: str, x: Tensor, current: Pass) -> None:
        """Without gradients inside a call that wants them: the first half of a reentrant checkpoint."""
        trains = any(p.requires_grad for name in current.route.names for p in self.bank[name].parameters())
        if trains and not x.requires_grad:
            raise RouteError(
                f"{path or 'the model'} runs under reentrant activation checkpointing, and what it is given requires no gradient, so "
                "its adapters would never train; use gradient_checkpointing_kwargs={'use_reentrant': False}, or call "
                "model.enable_input_require_grads() first"
            )
        current.linked = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "lease": None, "recent": deque(maxlen=_RECENT), "charts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self.charts = Charts()


class Watch:
    """Forward pre-hook of a module that stands beside sites in a block: in a recomputed block it may be the first to see the input."""

    def __init__(self, bank: Bank, path: str) -> None:
        self.bank = bank
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.bank.traffic.enter(self.path, args, kwargs, opens=False)


class Enter(Watch):
    """Forward pre-hook of a module that holds sites: where no call is running, its own begins."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.bank.traffic.enter(self.path, args, kwargs)


class Leave(Watch):
    """Forward hook of a module that holds sites, run after an exception too: its call is over."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self.bank.traffic.leave(self.path) and not self.path and output is not None:
            self.bank.lookout.after_call(module.training)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor of floating point among a call's arguments, or else the first tensor."""
    other = None
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                return value
            other = value if other is None else other
    return other if other is not None else next(tensors_in((*args, *kwargs.values())), None)
