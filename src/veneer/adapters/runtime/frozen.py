"""Factors of frozen adapters, cast and scaled once and kept from call to call.

The factors of an adapter that is only used are the same in every call: cast to the compute dtype, with the scale and DoRA's magnitude
scale multiplied into B, and the norm behind that scale, which takes a product with the whole base weight. For an adapter whose tensors
require no gradients (``adapter.requires_grad_(False)``, as in serving) they are kept for as long as all its tensors are the same by
identity, address and version, which is checked once a pass. Padded factors of adapters that are computed together are kept too, for the
last few sets of adapters at each site. Writing to a frozen adapter through ``tensor.data`` is the one change that cannot be seen;
`FrozenFactors.forget` is for callers that do so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.runtime.forward_pass import ForwardPass

_SETS = 2
"""Number of sets of adapters whose padded factors are kept at a site: those that decode, and those that came just before."""
T = TypeVar("T")
_VERSION, _TRAINED = attrgetter("_version"), attrgetter("requires_grad")


class _Seen(NamedTuple):
    """An adapter's tensors as they were seen last, held so that their ids stay theirs, and the number of that version."""

    tensors: list[Tensor]
    marks: list[list[int]]
    version: int


class FrozenFactors:
    """The kept factors of one bank's frozen adapters, by (site, adapter or slot), and the version of each adapter."""

    def __init__(self) -> None:
        self._count = count(1)
        self._seen: dict[str, _Seen] = {}
        self._kept: dict[tuple[str, object], OrderedDict[tuple[tuple[str, ...], tuple[object, ...]], Any]] = {}

    def versions(self, current: ForwardPass) -> Mapping[str, int | None]:
        """A number per adapter of a pass that changes whenever one of its tensors does; None for one that is trained."""
        if current.versions is None:
            found = {name: self._version(adapter) for name, adapter in current.plan.adapters.items()}
            numbers = tuple(found.values())
            current.frozen = None if None in numbers else numbers  # type: ignore[assignment]
            current.versions = found
        return current.versions

    def all_frozen(self, current: ForwardPass) -> tuple[int, ...] | None:
        """The versions of all adapters of a pass; None where one of them is trained."""
        if current.versions is None:
            self.versions(current)
        return current.frozen

    def forget(self, name: str) -> None:
        """Drop what is kept of an adapter."""
        self._seen.pop(name, None)
        for key, entries in list(self._kept.items()):
            if key[1] == name:
                del self._kept[key]
            else:
                for names, version in [entry for entry in list(entries) if name in entry[0]]:
                    entries.pop((names, version), None)

    def keep(
        self, site: str, names: tuple[str, ...], version: tuple[object, ...], make: Callable[[], T], slot: int = 0
    ) -> T:
        """The result of ``make`` for these adapters at a site, kept while ``version`` stays the same.

        One entry is kept for a single adapter. For sets of adapters the last few are kept per ``slot``: the number of the set among
        those of its batch.
        """
        single = len(names) == 1
        entries = self._kept.setdefault((site, names[0] if single else slot), OrderedDict())
        key = (names, version)
        known: T | None = entries.get(key)
        if known is not None:
            with suppress(KeyError):  # another thread may have dropped it
                entries.move_to_end(key)
            return known
        made = entries[key] = make()
        while len(entries) > (1 if single else _SETS):
            entries.popitem(last=False)
        return made

    def _version(self, adapter: Adapter) -> int | None:
        # Written as maps over builtins: with sixteen adapters every decoding step looks at thousands of tensors.
        tables = (
            (*adapter.tensors.values(), *adapter.overrides.values()) if adapter.overrides else adapter.tensors.values()
        )
        tensors: list[Tensor] = [value for table in tables for value in table.values()]
        if any(map(_TRAINED, tensors)):
            return None
        try:
            marks = [list(map(id, tensors)), list(map(_VERSION, tensors)), list(map(Tensor.data_ptr, tensors))]
        except RuntimeError:  # tensors made in inference mode have no version
            return None
        seen = self._seen.get(adapter.name)
        if seen is None or seen.marks != marks:
            seen = self._seen[adapter.name] = _Seen(tensors, marks, next(self._count))
        return seen.version

    def __reduce__(self) -> tuple[Any, ...]:
        return (FrozenFactors, ())
