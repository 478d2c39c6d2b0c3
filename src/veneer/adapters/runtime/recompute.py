"""Activation checkpointing: a layer that runs again in backward takes the route that it took in forward.

Both kinds of checkpointing that torch has call a part of the model a second time while gradients are computed, when the route's
context may be long closed, or another one open. What reaches the second call unchanged is the storage of its input. So in forward
every module at or around a site notes, per input storage, the pass that it ran under; in backward the first module of a recomputed
part looks its input up, and the pass found holds until the autograd node that asked for the recomputation is done. Where one input
went through several passes, or was made inside the part, the number of that node tells which: autograd counts a thread's nodes as they
are made. What cannot be told is an error, never a guess.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.adapters.runtime.forward_pass import Pass
from veneer.errors import RouteError

_PRUNE_AT = 1024
_PASSES_PER_STORAGE = 8
Moment = tuple[int, int]


def backward_moment() -> Moment | None:
    """Which node of which backward pass this thread is computing, or None outside backward."""
    task: int = torch._C._current_graph_task_id()
    if task == -1:
        return None
    node: Any = torch._C._current_autograd_node()
    return (task, -1 if node is None else node._sequence_nr())


class Memory:
    """Under which passes each tensor entered a watched module, by storage. Weak: it keeps no activation alive."""

    def __init__(self) -> None:
        self._noted: dict[int, tuple[StorageWeakRef, list[Pass]]] = {}
        self._prune_at = _PRUNE_AT

    def note(self, x: Tensor, current: Pass) -> None:
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
            # list() first: another thread may be noting.
            self._noted = {key: value for key, value in list(self._noted.items()) if not value[0].expired()}
            self._prune_at = max(_PRUNE_AT, 2 * len(self._noted))
        self._noted[storage._cdata] = (StorageWeakRef(storage), [current])

    def recall(self, x: Tensor, path: str, node: int) -> Pass | None:
        """The pass under which this very storage entered a module, or None where it never did.

        node: the number of the autograd node that asks. Raises RouteError where several passes are possible and differ.
        """
        entry = self._noted.get(x.untyped_storage()._cdata)
        if entry is None or entry[0].expired():
            return None
        seen = [one for one in entry[1] if one.made(node)] or entry[1]
        if not all(_alike(seen[0], other) for other in seen[1:]):
            raise RouteError(
                f"{path or 'the model'} is recomputed in backward, but the same tensor entered it under {len(seen)} different "
                "routes; give each route its own copy of the input (x.clone()), or call backward after each"
            )
        return seen[-1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return Memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Memory, ())


@dataclass(eq=False)
class Ready:
    """Outputs of layers that were computed together with the first of them, until the others are called.

    x, current: the input and the pass that they were computed for. mark: tells these and their state apart from all others.
    """

    x: Tensor
    current: Pass
    mark: tuple[int, ...]
    outputs: dict[str, Tensor]


class State(threading.local):
    """What a thread is doing with a bank's model right now.

    current: the pass that it runs, None outside any call. around: the passes around it, None the outermost. visited: the
    last `use` of another thread that it ran under. replay, moment: the pass that it runs again in backward, and for which node.
    muted: the probe is running, hosts stand aside. ready: outputs of sibling layers, computed ahead.
    """

    current: Pass | None = None
    around: tuple[Pass | None, ...] = ()
    visited: Any = None
    replay: Pass | None = None
    moment: Moment | None = None
    muted: bool = False
    ready: Ready | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return State()

    def __reduce__(self) -> tuple[Any, ...]:
        return (State, ())


def _alike(one: Pass, other: Pass) -> bool:
    """Whether running under either pass computes the same."""
    a, b = one.route, other.route
    same = a is b or (a.uniform and b.uniform and a.mixes == b.mixes)
    return same and one.draws == other.draws and one.training == other.training
