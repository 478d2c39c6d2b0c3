"""Factors of frozen adapters, ready to compute with and kept from call to call.

While an adapter is only used its factors are the same in every call: cast to the compute dtype, the scale and DoRA's gain folded into B,
and the norm behind that gain, which takes a product with the whole base weight. For an adapter whose tensors require no gradients
(``adapter.requires_grad_(False)``, as serving does) they are kept for as long as all its tensors are the very same, by identity, address
and version, which is looked up once a pass. Adapters that are computed as a bundle have their banks kept too, for the last few sets of
adapters at each site. Writing to a frozen adapter through ``tensor.data`` is the one change that a tensor does not tell of; `forget` is
for those who must.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from veneer.adapters.runtime.forward_pass import Pass

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter
    from veneer.adapters.bank import Bank

__all__ = ["forget", "generation", "keep", "states"]

_SETS = 2
"""Banks of so many sets of adapters are kept at a site: those that decode, and those that came just before."""
_count = itertools.count(1)
T = TypeVar("T")


class _State:
    """An adapter's tensors as they were seen last, and the number of that state."""

    def __init__(self, tensors: list[Tensor], marks: list[list[int]]) -> None:
        self.tensors = tensors
        self.marks = marks
        self.number = next(_count)


_VERSION, _TRAINED = attrgetter("_version"), attrgetter("requires_grad")


_states: WeakKeyDictionary[Adapter, _State] = WeakKeyDictionary()
_kept: WeakKeyDictionary[Bank, dict[tuple[str, object], OrderedDict[object, object]]] = WeakKeyDictionary()


def generation(current: Pass, adapter: Adapter) -> int | None:
    """A number that changes whenever a tensor of a frozen adapter does; None for one that is trained, or that tells of no changes.

    Looked up once a pass.
    """
    known = current.generations.get(adapter.name, -1)
    if known != -1:
        return known
    # Written as maps over builtins: with sixteen adapters there are thousands of tensors to look at in every step of decoding.
    tables = (*adapter.tensors.values(), *adapter.overrides.values()) if adapter.overrides else adapter.tensors.values()
    tensors: list[Tensor] = [value for own in tables for value in own.values()]
    found = None
    if not any(map(_TRAINED, tensors)):
        try:
            marks = [list(map(id, tensors)), list(map(_VERSION, tensors)), list(map(Tensor.data_ptr, tensors))]
        except RuntimeError:  # made in inference mode, a tensor does not tell of changes
            marks = []
        state = _states.get(adapter)
        if marks and (state is None or state.marks != marks):
            state = _states[adapter] = _State(tensors, marks)
        found = state.number if marks and state is not None else None
    current.generations[adapter.name] = found
    return found


def states(current: Pass, bank: Bank) -> tuple[int, ...] | None:
    """The generations of all adapters of a pass; None where one of them is trained."""
    found = current.states
    if isinstance(found, bool):
        numbers = [generation(current, bank[name]) for name in current.route.names]
        found = current.states = None if None in numbers else tuple(numbers)  # type: ignore[arg-type]
    return found


def forget(adapter: Adapter) -> None:
    """Make what is kept of an adapter anew at its next use."""
    _states.pop(adapter, None)


def keep(
    bank: Bank, site: str, names: tuple[str, ...], state: tuple[object, ...], make: Callable[[], T], place: int = 0
) -> T:
    """What ``make`` gives for these adapters at a site, kept while ``state`` stays the same.

    A single adapter's has a place of its own; of sets of adapters the last few are kept at each ``place``: the number of the set among
    those of its batch.
    """
    single = len(names) == 1
    places = _kept.setdefault(bank, {})
    entries = places.setdefault((site, names[0] if single else place), OrderedDict())
    key = (names, state)
    known = entries.get(key)
    if known is not None:
        entries.move_to_end(key)
        return known  # type: ignore[return-value]
    made = make()
    entries[key] = made
    while len(entries) > (1 if single else _SETS):
        entries.popitem(last=False)
    return made
