"""Every error that a user of Veneer can cause, in one tree.

    VeneerError                      the root; ``except VeneerError`` catches all of them
    ├── ConfigError        ValueError    an option: unknown, of the wrong type, out of range (exit code 2)
    ├── DataError          ValueError    a file of examples or a row in it
    ├── TargetError        ValueError    a pattern that matches nothing, a site that a method cannot take
    ├── AdapterError       ValueError    an adapter and a base, a name or another adapter that do not fit together
    ├── RouteError         RuntimeError  a route that does not fit its batch, or is used at the wrong time
    ├── CheckpointError    ValueError    a folder or file of tensors, settings or saved state
    │   └── FolderInUseError ValueError  a folder that another process works in
    ├── BaseModelError     ValueError    a base that cannot be found, read or used
    ├── TrainingError      RuntimeError  a run that cannot go on: a loss that is not finite, nothing that moves
    │   └── ProcessError   RuntimeError  a process of a run of several that ended or does not answer
    ├── MemoryPlanError    RuntimeError  a run that does not fit in memory
    ├── ComposeError       ValueError    adapters that cannot be summed, merged or extracted as asked
    ├── ExportError        ValueError    a target format that cannot hold what it is asked to hold
    └── ServeError         RuntimeError  a request that cannot be answered, though nothing is wrong with it
        └── EngineBusyError  RuntimeError  more requests than may wait

Each class is also a built-in exception, so that code which knows nothing of Veneer handles it sensibly. What is not in
this tree and reaches a user is a defect of Veneer.

A message is one sentence that says what went wrong, where, what was expected, what was found, and what to do. Where one
input may hold several mistakes, ``Problems`` gathers them, so that the user repairs them in one go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

__all__ = [
    "AdapterError",
    "BaseModelError",
    "CheckpointError",
    "ComposeError",
    "ConfigError",
    "DataError",
    "EngineBusyError",
    "ExportError",
    "FolderInUseError",
    "MemoryPlanError",
    "Problems",
    "ProcessError",
    "RouteError",
    "ServeError",
    "TargetError",
    "TrainingError",
    "VeneerError",
]


class VeneerError(Exception):
    """The root of every error that a user can cause.

    ``exit_code`` is what the command line ends with: 1 in general, 2 where the command itself was wrong.
    """

    exit_code: ClassVar[int] = 1


class ConfigError(VeneerError, ValueError):
    """An option that is unknown, of the wrong type or out of its range, on the command line or in a file."""

    exit_code: ClassVar[int] = 2


class DataError(VeneerError, ValueError):
    """A file of examples that cannot be read, or rows in it that cannot be used."""


class TargetError(VeneerError, ValueError):
    """A pattern that matches no site, or a site that the method cannot adapt."""


class AdapterError(VeneerError, ValueError):
    """An adapter that does not fit the base, the name or the adapter that it is put together with."""


class RouteError(VeneerError, RuntimeError):
    """A route that does not fit the batch, names an unknown adapter, or is used at the wrong time."""


class CheckpointError(VeneerError, ValueError):
    """A folder or file of tensors, settings or saved state that is missing, damaged or does not fit."""


class FolderInUseError(CheckpointError):
    """A folder that another process works in."""


class BaseModelError(VeneerError, ValueError):
    """A base that cannot be found, read or used."""


class TrainingError(VeneerError, RuntimeError):
    """A run that cannot go on: a loss that is not finite, parameters that do not move, state that does not fit.

    ``code`` is one word for programs: non_finite, still, data, memory, device, process, training.
    """

    def __init__(self, message: str, code: str = "training") -> None:
        super().__init__(message)
        self.code = code


class ProcessError(TrainingError):
    """A run of several processes of which one has ended, does not answer, or holds something else than the others."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "process")


class MemoryPlanError(VeneerError, RuntimeError):
    """A run whose needs exceed the memory there is."""


class ComposeError(VeneerError, ValueError):
    """Adapters or weights that cannot be summed, merged or extracted as asked."""


class ExportError(VeneerError, ValueError):
    """A target format that cannot represent what it is asked to hold."""


class ServeError(VeneerError, RuntimeError):
    """A valid request that cannot be answered: the engine is stopping, full or out of memory."""


class EngineBusyError(ServeError):
    """More requests than may wait; send the request again later."""


def listed(names: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """Join the first names, and count the rest: "a, b and 3 more"."""
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return separator.join(every[:limit]) + more


class Problems:
    """Gathers problems and raises them all as one error, one a line.

    >>> problems = Problems()
    >>> problems.add("line 3: the row has no answer")
    >>> problems.raise_if_any(DataError, "rows.jsonl cannot be used")
    Traceback (most recent call last):
        ...
    veneer.errors.DataError: rows.jsonl cannot be used: line 3: the row has no answer
    """

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, problem: str) -> None:
        """Note one problem: a sentence or clause, with its place, without a full stop at the end."""
        self._found.append(problem)

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._found))

    def raise_if_any(self, error: type[VeneerError], headline: str, *, limit: int = 50) -> None:
        """Raise ``error`` if anything was noted; otherwise do nothing.

        One problem stands behind the headline on the same line; several stand below it, in the order in which they were
        noted. Of more than ``limit`` problems the rest is counted.
        """
        if not self._found:
            return
        if len(self._found) == 1:
            raise error(f"{headline}: {self._found[0]}")
        lines = [f"{headline}: {len(self._found)} problems"]
        lines += [f"  - {problem}" for problem in self._found[:limit]]
        if len(self._found) > limit:
            lines.append(f"  and {len(self._found) - limit} more")
        raise error("\n".join(lines))
