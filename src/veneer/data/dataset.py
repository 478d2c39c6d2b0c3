"""Loading of files as training examples.

Examples are stored as flat columns (ids, weights, offsets) with 8 bytes per token. Columns beyond a limit go to a
temporary memory-mapped file, so the data of a run may exceed memory. All bad rows are collected before an error is
raised.

This module refuses rows that cannot be trained; ``check.py`` warns about rows that should not be.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np

from veneer._terminal import counted
from veneer.data.chat.render import Rendered, Renderer
from veneer.data.example import Example
from veneer.data.labelled import LabelledRenderer
from veneer.data.rows.row import BadRow, Row
from veneer.data.rows.shapes import RowReader
from veneer.errors import ConfigError, DataError

__all__ = ["Examples", "LoadReport", "Subset", "Truncate", "cut_problem", "load_examples", "usable_parts"]

Truncate = Literal["error", "drop", "end"]

_SPILL = 256 << 20  # bytes of a column that are kept in memory
_SHOWN, _SHOWN_ALIKE = 20, 3


class Examples(Sequence[Example]):
    """A sequence of examples, stored as flat columns."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._ids = _Column("i", np.int32)
        self._weights = _Column("f", np.float32)
        self._labels = _Column("f", np.float32)
        self._offsets = array("q", [0])
        self._seconds = array("i")
        self._desirable = array("b")
        self._sources: list[str] = []
        self._lengths: dict[int, tuple[int, ...]] = {}
        """Lengths of the sequences of those examples that have several."""
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        """Append an example."""
        if example.lengths:
            self._lengths[len(self)] = example.lengths
        self._ids.extend(example.ids)
        self._weights.extend(example.weights)
        if bool(example.labels) != self.labelled and len(self):
            raise DataError(f"{example.source}: a set of examples has labels in all rows or in none")
        self._labels.extend(example.labels)
        self._seconds.append(example.second)
        self._desirable.append(example.desirable)
        self._offsets.append(self._offsets[-1] + len(example.ids))
        self._sources.append(example.source)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def labelled(self) -> bool:
        """True if the examples have labels."""
        return len(self._labels) > 0

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        a, b = self._offsets[at], self._offsets[at + 1]
        labels = tuple(self._labels.values(a, b)) if self.labelled else ()
        ids, weights = tuple(self._ids.values(a, b)), tuple(self._weights.values(a, b))
        lengths, desirable = self._lengths.get(at, ()), bool(self._desirable[at])
        return Example(ids, weights, self._sources[at], lengths, labels, self._seconds[at], desirable)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        lengths: list[int] = np.diff(np.frombuffer(self._offsets, dtype=np.int64)).tolist()
        return lengths

    @property
    def tokens(self) -> int:
        """The number of tokens of all examples."""
        return int(self._offsets[-1])


class Subset(Sequence[Example]):
    """A subset of examples by index, without a copy."""

    def __init__(self, examples: Examples, indices: Iterable[int]) -> None:
        self._examples = examples
        self._indices = array("q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._examples[i] for i in self._indices[index]]
        return self._examples[self._indices[index]]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        lengths = self._examples.lengths
        return [lengths[i] for i in self._indices]


@dataclass(slots=True)
class LoadReport:
    """Counts of loaded, refused and truncated rows.

    Attributes:
        notices: what was detected about each file, one line each.
        rows: rows read, including bad ones.
        bad_rows: rows that cannot be trained.
        examples: number of examples; a row may give several (see ``notes``).
        tokens, trained: number of their tokens, and of those with a weight.
        bad, problems: the first problems of each kind, and the number of all; a row may have several.
        alike: number of problems by key and reason.
        dropped, cut, lost: rows dropped for their length, rows truncated, and the trained tokens lost by both.
        notes: number of rows by note (keys of ``rendered.NOTES``).
        stops: number of trained turns (or texts) by the token that ends them.
    """

    notices: list[str] = field(default_factory=list)
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    bad: list[BadRow] = field(default_factory=list)
    problems: int = 0
    bad_rows: int = 0
    bad_source: str = ""
    dropped: int = 0
    cut: int = 0
    lost: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    stops: Counter[int] = field(default_factory=Counter)
    alike: Counter[tuple[str, str]] = field(default_factory=Counter)

    def refuse(self, bad: BadRow) -> None:
        """Count a problem of a row; keep it if it is one of the first of its kind."""
        self.problems += 1
        if bad.source != self.bad_source:  # the problems of a row follow each other
            self.bad_rows, self.bad_source = self.bad_rows + 1, bad.source
        known = (bad.key, bad.reason)
        if self.alike[known] or len(self.bad) < _SHOWN:
            self.alike[known] += 1
            if self.alike[known] <= _SHOWN_ALIKE:
                self.bad.append(bad)

    def raise_if_bad(self) -> None:
        """Raise an error if rows were refused.

        Raises:
            DataError: names the first bad rows of each kind and counts the others.
        """
        if not self.problems:
            return
        shown: Counter[tuple[str, str]] = Counter()
        lines = []
        for bad in self.bad:
            known = (bad.key, bad.reason)
            shown[known] += 1
            more = self.alike[known] - _SHOWN_ALIKE if shown[known] == _SHOWN_ALIKE else 0
            lines.append(f"  - {bad}" + (f" (and {more} more rows like it)" if more > 0 else ""))
        told = sum(self.alike.values())
        if self.problems > told:
            lines.append(f"  and {self.problems - told} more")
        raise DataError(f"{counted(self.problems, 'problem')} in {counted(self.rows, 'row')}:\n" + "\n".join(lines))


def load_examples(
    files: Sequence[str | os.PathLike[str]],
    renderer: Renderer | LabelledRenderer,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    truncate: Truncate = "error",
    skip_bad: bool = False,
    on_row: Callable[[Row, list[Rendered]], None] | None = None,
) -> tuple[Examples, LoadReport]:
    """Read, render and verify all rows of some files, in order.

    Args:
        files: one or more files of rows.
        renderer: the renderer; its ``max_length`` is the limit for ``truncate``.
        format, columns, roles: see ``RowReader``.
        truncate: treatment of rows longer than ``max_length``: "error", "drop" (skip the row) or "end" (cut its end off).
            The last two are counted, with the trained tokens lost.
        skip_bad: skip and count bad rows instead of raising.
        on_row: called with every usable row and its parts (for example ``check.RowChecks.add``).

    Raises:
        DataError: files or rows cannot be used (all are reported at once), or no example is left.
        ConfigError: ``truncate`` has another value.
    """
    if truncate not in ("error", "drop", "end"):
        raise ConfigError(f"truncate: expected error, drop or end, found {truncate!r}")
    examples, report = Examples(), LoadReport()
    for path in files:
        rows = RowReader(path, format=format, columns=columns, roles=roles)
        for result in renderer.render_many(rows):
            parts = usable_parts(result, report)
            if parts and result[0] is not None:
                if on_row is not None:
                    on_row(result[0], parts)
                _take(result[0], parts, renderer.options.max_length, truncate, examples, report)
        report.notices += [*rows.notices(), *renderer.notices(rows.shape.format)]
    if not skip_bad:
        report.raise_if_bad()
    if not len(examples):
        raise DataError(
            f"{', '.join(str(path) for path in files)}: no example is left of {counted(report.rows, 'row')} "
            f"({report.bad_rows} bad, {report.dropped} dropped for their length)"
        )
    report.examples, report.tokens = len(examples), examples.tokens
    return examples, report


def usable_parts(result: tuple[Row | None, Any], report: LoadReport) -> list[Rendered]:
    """Count a rendered row, and return its parts; none if it cannot be trained, which is added to ``report``."""
    row, found = result
    if isinstance(found, BadRow):
        report.rows += found.source != report.bad_source
        report.refuse(found)
        return []
    report.rows += 1
    parts: list[Rendered] = found
    if row is not None and row.rejected is not None:
        empty = next((part.answer for part in parts if not (part.trained or part.lost)), None)
        if empty is not None:
            report.refuse(BadRow(row.source, empty, f"nothing to compare: {_why_nothing(row)}"))
            return []
    elif row is not None and not any(part.trained or part.lost for part in parts):
        report.refuse(BadRow(row.source, row.key, f"nothing to learn: {_why_nothing(row)}"))
        return []
    report.notes.update({note for part in parts for note in part.notes})
    report.stops.update(token for part in parts for token in part.stops)
    return parts


def _take(
    row: Row, parts: list[Rendered], limit: int | None, truncate: Truncate, examples: Examples, report: LoadReport
) -> None:
    longest = max(part.length for part in parts)
    if limit is not None and longest > limit:
        if truncate == "error":
            reason = (
                f"{longest} tokens, but the maximum length is {limit}; shorten the row, or set truncate to end (cut longer "
                "rows) or drop (skip them)"
            )
            report.refuse(BadRow(parts[0].source, "", reason))
            return
        if truncate == "drop":
            report.dropped += 1
            report.lost += sum(part.trained + part.lost for part in parts)
            return
        report.cut += 1
        report.lost += sum(part.lost for part in parts)
    problem = cut_problem(row, parts, limit)
    if problem is not None:
        report.refuse(problem)
        return
    kept = [part for part in parts if part.trained]
    report.trained += sum(part.trained for part in kept)
    if row.rejected is not None:
        examples.append(Example.of_sequences([part.example for part in kept]))
        return
    for part in kept:
        examples.append(part.example)


def cut_problem(row: Row, parts: list[Rendered], limit: int | None) -> BadRow | None:
    """The reason why a row cannot be trained once its parts are cut to ``limit`` tokens; None if it can."""
    if not any(part.trained for part in parts):
        return BadRow(row.source, "", f"nothing to learn within {limit} tokens: the answer comes after them")
    if row.rejected is None:
        return None
    for part in parts:
        if not part.trained:
            return BadRow(
                row.source, part.answer, f"nothing to compare within {limit} tokens: the answer comes after them"
            )
    if parts[0].ids == parts[1].ids:
        return BadRow(row.source, row.rejected.key, f"the two answers are the same within {limit} tokens")
    return None


def _why_nothing(row: Row) -> str:
    if row.kind != "chat":
        return "no token is trained"
    if any(message.get("role") == "assistant" for message in row.messages):
        return "every message of the assistant has weight 0"
    roles = dict.fromkeys(str(message.get("role")) for message in row.messages)
    return f"no message has the role assistant; the roles are {', '.join(roles)}"


class _Column:
    """A growing column of numbers that moves to a temporary file beyond ``_SPILL`` bytes."""

    def __init__(self, code: Literal["i", "f"], dtype: type[np.generic]) -> None:
        self._code: Literal["i", "f"] = code
        self._dtype = np.dtype(dtype)
        self._recent = array(code)
        self._spilled = 0
        self._file: Any = None
        self._map: Any = None

    def __len__(self) -> int:
        return self._spilled + len(self._recent)

    def extend(self, values: Iterable[float]) -> None:
        self._recent.extend(values)  # type: ignore[arg-type]  # ids are integers
        if len(self._recent) * self._dtype.itemsize >= _SPILL:
            self._spill()

    def values(self, a: int, b: int) -> Iterator[Any]:
        if a >= self._spilled:
            return iter(self._recent[a - self._spilled : b - self._spilled])
        if self._map is None or len(self._map) < self._spilled:
            self._map = np.memmap(self._file, dtype=self._dtype, mode="r", shape=(self._spilled,))
        known = self._map[a : min(b, self._spilled)].tolist()
        return iter([*known, *self._recent[: max(0, b - self._spilled)]])

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="veneer-examples-")  # noqa: SIM115 (closed by the finalizer)
            weakref.finalize(self, self._file.close)
        self._recent.tofile(self._file)
        self._file.flush()
        self._spilled += len(self._recent)
        self._recent = array(self._code)
