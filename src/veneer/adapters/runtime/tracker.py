"""RouteTracker: under which route each call of the model runs, in forward and when layers run again in backward.

`Bank.use` opens a context with one route. A call of the whole model, or of a part of it outside any such call, is a forward pass: it
begins when the first module at or around a site is entered and belongs to the context that is open then. One thread owns the context;
threads that it starts run under it too, since generation often does. A context that ends or changes under a running call is an error,
because the call would silently continue on the base or on another route.

Activation checkpointing calls a part of the model a second time while gradients are computed, when the route's context may be closed or
another one open. The storage of the part's input reaches the second call unchanged. So in forward every module at or around a site notes,
per input storage, the pass that it ran under; in backward the first module of a recomputed part looks its input up, and the pass found
holds until the autograd node that asked for the recomputation is done. If one input went through several passes, or was made inside the
part, the number of that node decides: autograd counts a thread's nodes in order. Anything still ambiguous is an error.

The reentrant kind of checkpointing runs its forward without gradients and cuts the graph if none of its inputs requires one: with a
frozen base, nothing below would ever train. The tracker refuses it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.adapters.adapter import Adapter
from veneer.adapters.call_check import CallMonitor
from veneer.adapters.runtime.forward_pass import ForwardPass, RouteContext, SharedOutputs, input_shapes, tensors_in
from veneer.adapters.runtime.plan import PlanCache
from veneer.adapters.runtime.route import Route
from veneer.errors import RouteError

BASE = Route(((),))
_RECENT = 64
"""Number of passes with gradients that can be found by the numbers of their autograd nodes."""
_PRUNE_AT = 1024
_PASSES_PER_STORAGE = 8
BackwardPosition = tuple[int, int]
"""(backward pass, autograd node) that a thread is computing."""


def backward_position() -> BackwardPosition | None:
    """The autograd node and backward pass that this thread is computing, or None outside backward."""
    task: int = torch._C._current_graph_task_id()
    if task == -1:
        return None
    node: Any = torch._C._current_autograd_node()
    return (task, -1 if node is None else node._sequence_nr())


class ThreadState(threading.local):
    """State of one thread in calls of a bank's model.

    Attributes:
        current, around: the pass that it runs, None outside any call; the passes around it, None the outermost.
        visited: the last context of another thread that it ran under.
        recomputed, position: the pass that it runs again in backward, and for which node.
        muted: a dry run is running and adapters do not act.
        shared: outputs of layers that were computed ahead.
    """

    current: ForwardPass | None = None
    around: tuple[ForwardPass | None, ...] = ()
    visited: RouteContext | None = None
    recomputed: ForwardPass | None = None
    position: BackwardPosition | None = None
    muted: bool = False
    shared: SharedOutputs | None = None


class InputRegistry:
    """The passes under which each tensor entered a watched module, by storage. Weak: it keeps no activation alive."""

    def __init__(self) -> None:
        self._noted: dict[int, tuple[StorageWeakRef, list[ForwardPass]]] = {}
        self._prune_at = _PRUNE_AT

    def note(self, x: Tensor, current: ForwardPass) -> None:
        """Remember that ``x`` entered a module under ``current``."""
        storage = x.untyped_storage()
        entry = self._noted.get(storage._cdata)
        # A weak reference keeps the address from being used again, so an entry that is not expired is this very storage.
        if entry is not None and not entry[0].expired():
            passes = entry[1]
            if passes[-1] is not current and current not in passes:
                passes.append(current)
                del passes[:-_PASSES_PER_STORAGE]
            return
        if len(self._noted) >= self._prune_at:
            self.prune()
        self._noted[storage._cdata] = (StorageWeakRef(storage), [current])

    def prune(self) -> None:
        """Drop the passes of storages that are gone: they keep the adapters of their routes in memory."""
        # list() first: another thread may be noting.
        self._noted = {key: value for key, value in list(self._noted.items()) if not value[0].expired()}
        self._prune_at = max(_PRUNE_AT, 2 * len(self._noted))

    def find(self, x: Tensor, path: str, node: int) -> ForwardPass | None:
        """The pass under which this storage entered a module, or None. ``node`` is the autograd node that asks.

        Raises RouteError where several passes are possible and differ.
        """
        entry = self._noted.get(x.untyped_storage()._cdata)
        if entry is None or entry[0].expired():
            return None
        seen = [one for one in entry[1] if one.made(node)] or entry[1]
        if not all(seen[0].computes_like(other) for other in seen[1:]):
            raise RouteError(
                f"{path or 'the model'} is recomputed in backward, but the same tensor entered it under {len(seen)} different "
                "routes; give each route its own copy of the input (x.clone()), or call backward after each"
            )
        return seen[-1]


class RouteTracker:
    """The open context of one bank's model, and the passes that run under it."""

    def __init__(self, adapters: Mapping[str, Adapter], monitor: CallMonitor) -> None:
        self.adapters = adapters
        self.monitor = monitor
        self.inputs = InputRegistry()
        self.state = ThreadState()
        self.recent: deque[ForwardPass] = deque(maxlen=_RECENT)
        self.plans = PlanCache(adapters)
        self.context: RouteContext | None = None
        self._lock = threading.Lock()

    @contextmanager
    def hold(
        self,
        route: Route,
        keep: Tensor | None,
        training: bool | None,
        windows: Mapping[str, tuple[int, int, int]] | None = None,
    ) -> Iterator[None]:
        """Run every call of the model inside this context under ``route``; afterwards the context around it is restored."""
        me = threading.get_ident()
        context = RouteContext(route, None if keep is None else route.select(keep), training, me)
        context.windows = windows or {}
        position = backward_position()
        context.task = -1 if position is None else position[0]
        state = self.state
        with self._lock:
            outer = self.context
            if outer is not None and outer.owner != me:
                raise RouteError(
                    "another thread's route is active on this bank; one model runs under one route at a time: "
                    "put the rows into one batch with a route row by row, or wait for it to end"
                )
            context.outer = outer
            self.context = context
        before = (state.current, state.around)
        try:
            yield
        finally:
            with self._lock:
                self.context = outer
                context.open = False
            state.current, state.around = before
        if context.visitors:
            raise RouteError(
                "the context of a route was left while another thread was still running the model under it; wait for the "
                "thread (thread.join()) inside the context"
            )

    def names_in_use(self) -> set[str]:
        """Adapters of the open context and of those around it."""
        found: set[str] = set()
        context = self.context
        while context is not None:
            found.update(context.route.names)
            context = context.outer
        return found

    def at_site(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardPass | None:
        """`enter` for a site, where adapters act.

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

    def enter(
        self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, opens: bool = True
    ) -> ForwardPass | None:
        """Enter a module at or around a site: the pass that it runs under, or None where adapters do not act.

        ``opens``: the module's call is a pass where none is running; then its end must be announced by `leave`. In backward the pass is
        that of the forward which is recomputed, or None if it is not known (yet).
        """
        state = self.state
        if state.muted:
            return None
        position = self._recomputing()
        if position is not None:
            return self._recompute(path, args, kwargs, position)
        current = state.current
        begins = opens and (current is None or path == current.top or self._changed(current))
        if begins:
            current = self._begin(path, args, kwargs)
        if current is None:
            return None
        grad = torch.is_grad_enabled()
        if grad or ((begins or current.grad) and not torch.is_inference_mode_enabled()):
            x = _first(args, kwargs)
            if x is not None:
                self.inputs.note(x, current)
                if not grad and current.grad and not current.linked and x.is_floating_point():
                    self._refuse_cut(path, x, current)
        return current

    def leave(self, path: str) -> bool:
        """Leave a module, after an exception too. Returns whether its call was a pass."""
        state = self.state
        ended = state.current
        if ended is None or ended.top != path or state.muted or self._recomputing() is not None:
            return False
        ended.close()
        if ended.context is not None and ended.context.owner != threading.get_ident():
            with self._lock:
                ended.context.visitors -= 1
        state.current, state.around = state.around[-1], state.around[:-1]
        return True

    def _begin(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForwardPass:
        state, context = self.state, self.context
        if context is None:
            if state.visited is not None:
                raise RouteError(
                    "the route under which this thread ran the model is over, and none is open now; wait for the thread "
                    "(thread.join()) inside the context, or open bank.use(None) here to go on with the base"
                )
        else:
            state.visited = None if context.owner == threading.get_ident() else context
        shapes = input_shapes(args, kwargs)
        route = BASE if context is None else context.route
        if route.repeat > 1:
            rows = {shape[0] for shape in shapes}
            if route.length not in rows and route.before_beams().length in rows:
                route = route.before_beams()
        if route.unit == "row" and shapes and all(shape[0] != route.length for shape in shapes):
            raise RouteError(
                f"the route has {route.length} rows, the batch has {shapes[0][0]}; give one entry a row "
                "(beam search repeats each row num_beams times: use(..., repeat=num_beams))"
            )
        if not path and not route.uniform:
            state.muted = True
            try:
                self.monitor.find_rows(args, kwargs)
            finally:
                state.muted = False
        plan = self.plans.plan(route, shapes, None if context is None else context.keep)
        begun = ForwardPass(context, plan, path)
        if context is not None and state.visited is not None:
            with self._lock:
                context.visitors += 1
        state.current, state.around = begun, (*state.around, state.current)
        if begun.grad:
            self.recent.append(begun)
        return begun

    def _changed(self, current: ForwardPass) -> bool:
        """True if a context was opened inside the call that this thread is in.

        Raises RouteError if the one that the call runs under was left by the thread that owns it.
        """
        if current.context is self.context:
            return False
        if current.context is not None and not current.context.open:
            raise RouteError(
                "the context of a route was left while this call of the model was still running under it; wait for the "
                "thread (thread.join()) inside the context"
            )
        return self.context is not None and self.context.owner == threading.get_ident()

    def _recomputing(self) -> BackwardPosition | None:
        """The position in backward at which this thread recomputes layers; a context that was opened in backward recomputes none."""
        position = backward_position()
        if position is None or (self.context is not None and self.context.task == position[0]):
            return None
        return position

    def _recompute(
        self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], position: BackwardPosition
    ) -> ForwardPass | None:
        state = self.state
        x = _first(args, kwargs)
        if state.position != position:
            found = None if x is None else self.inputs.find(x, path, position[1])
            if found is None:
                # Nodes are counted per thread, so their numbers decide only for a backward in the thread of its forward.
                here = [one for one in self.recent if one.thread == threading.get_ident() and one.made(position[1])]
                if not here:
                    return None
                found = max(here, key=lambda one: one.first_node)
            state.recomputed, state.position = found, position
        elif x is not None and state.recomputed is not None:
            # A checkpoint inside a checkpoint: its own second run will look for this tensor.
            self.inputs.note(x, state.recomputed)
        return state.recomputed

    def _refuse_cut(self, path: str, x: Tensor, current: ForwardPass) -> None:
        """Refuse a call without gradients inside one that wants them: the first half of a reentrant checkpoint."""
        trains = any(p.requires_grad for name in current.route.names for p in self.adapters[name].parameters())
        if trains and not x.requires_grad:
            raise RouteError(
                f"{path or 'the model'} runs under reentrant activation checkpointing, and what it is given requires no gradient, so "
                "its adapters would never train; use gradient_checkpointing_kwargs={'use_reentrant': False}, or call "
                "model.enable_input_require_grads() first"
            )
        current.linked = True

    def __getstate__(self) -> dict[str, Any]:  # a copy begins without calls
        return {"adapters": self.adapters, "monitor": self.monitor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RouteTracker.__init__(self, **state)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor of floating point among a call's arguments, or else the first tensor."""
    other = None
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                return value
            other = value if other is None else other
    return other if other is not None else next(tensors_in((*args, *kwargs.values())), None)
