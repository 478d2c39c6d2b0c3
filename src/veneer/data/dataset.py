"""Files to examples: the way that training takes.

Examples are kept as flat columns (ids, weights, offsets), 8 bytes a token, not as Python objects; what outgrows a
bound goes to a temporary file that is mapped into memory, so the data of a run may be larger than memory. All bad rows are
gathered before anything is raised.

Boundary: this module refuses what cannot be trained; ``check.py`` looks for what merely should not be.
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

from veneer.data.chat.render import Rendered, Renderer
from veneer.data.example import Example
from veneer.data.rows.row import Bad, Row
from veneer.data.rows.shapes import Rows
from veneer.errors import ConfigError, DataError

__all__ = ["Examples", "LoadReport", "Selected", "Truncate", "load_examples", "pieces_of"]

Truncate = Literal["error", "drop", "end"]

_SPILL = 256 << 20  # bytes of a column that stay in memory
_SHOWN, _SHOWN_ALIKE = 20, 3


class Examples(Sequence[Example]):
    """Examples as flat columns. ``lengths[i]`` is the number of tokens of example i, without making it."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._ids = _Column("i", np.int32)
        self._weights = _Column("f", np.float32)
        self._offsets = array("q", [0])
        self._sources: list[str] = []
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        """Add one example behind the others."""
        self._ids.extend(example.ids)
        self._weights.extend(example.weights)
        self._offsets.append(self._offsets[-1] + len(example.ids))
        self._sources.append(example.source)

    def __len__(self) -> int:
        return len(self._sources)

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
        return Example(tuple(self._ids.part(a, b)), tuple(self._weights.part(a, b)), self._sources[at])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        lengths: list[int] = np.diff(np.frombuffer(self._offsets, dtype=np.int64)).tolist()
        return lengths

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return int(self._offsets[-1])


class Selected(Sequence[Example]):
    """Some examples of others, by their numbers; nothing is copied."""

    def __init__(self, examples: Examples, numbers: Iterable[int]) -> None:
        self._examples = examples
        self._numbers = array("q", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._examples[number] for number in self._numbers[index]]
        return self._examples[self._numbers[index]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        every = self._examples.lengths
        return [every[number] for number in self._numbers]


@dataclass(slots=True)
class LoadReport:
    """What became of the rows of some files.

    Attributes:
        stated: what was recognised about each file, a line each.
        rows: rows read, the bad ones included.
        examples: examples made; a row may make several (see ``notes``).
        tokens, trained: their tokens, and those that the loss counts.
        bad, bad_count: the first bad rows of each kind, and how many there are.
        alike: how many rows have the same fault, by key and reason.
        dropped, cut, lost: rows left out for their length, rows cut at their end, and the trained tokens that cost.
        notes: how many rows each note applies to (keys of ``notes.NOTES``).
    """

    stated: list[str] = field(default_factory=list)
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    bad: list[Bad] = field(default_factory=list)
    bad_count: int = 0
    dropped: int = 0
    cut: int = 0
    lost: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    alike: Counter[tuple[str, str]] = field(default_factory=Counter)

    def refuse(self, bad: Bad) -> None:
        """Count a bad row, and keep it if it is one of the first of its kind."""
        self.bad_count += 1
        known = (bad.key, bad.reason)
        if self.alike[known] or len(self.bad) < _SHOWN:
            self.alike[known] += 1
            if self.alike[known] <= _SHOWN_ALIKE:
                self.bad.append(bad)

    def raise_if_bad(self) -> None:
        """Raise if a row was refused.

        Raises:
            DataError: names the first of them, and counts the rest.
        """
        if not self.bad_count:
            return
        shown: Counter[tuple[str, str]] = Counter()
        lines = []
        for bad in self.bad:
            known = (bad.key, bad.reason)
            shown[known] += 1
            more = self.alike[known] - _SHOWN_ALIKE if shown[known] == _SHOWN_ALIKE else 0
            lines.append(f"  - {bad}" + (f" (and {more} more rows alike)" if more > 0 else ""))
        told = sum(self.alike.values())
        if self.bad_count > told:
            lines.append(f"  and {self.bad_count - told} more")
        counted = f"{self.bad_count} problem{'s' if self.bad_count > 1 else ''} in {self.rows} row{'s' if self.rows > 1 else ''}"
        raise DataError(f"{counted}:\n" + "\n".join(lines))


def load_examples(
    files: Sequence[str | os.PathLike[str]],
    renderer: Renderer,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    truncate: Truncate = "error",
    skip_bad: bool = False,
    look: Callable[[Row, list[Rendered]], None] | None = None,
) -> tuple[Examples, LoadReport]:
    """Read, render and prove all rows of some files, in order.

    Args:
        files: one or more files of rows.
        renderer: with its ``max_length``, which ``truncate`` is about.
        format, columns, roles: see ``Rows``.
        truncate: what becomes of a row longer than ``max_length``: "error", "drop" (left out) or "end" (its end is cut
            off). Both are counted, with the trained tokens lost.
        skip_bad: leave bad rows out and count them, instead of raising.
        look: is shown every usable row with its pieces (``check.Remarks`` notes what is remarkable).

    Raises:
        DataError: a file or row cannot be used (all of them at once), or no example is left.
    """
    if truncate not in ("error", "drop", "end"):
        raise ConfigError(f"truncate: expected error, drop or end, found {truncate!r}.")
    examples, report = Examples(), LoadReport()
    for path in files:
        rows = Rows(path, format=format, columns=columns, roles=roles)
        for result in renderer.render_many(rows):
            report.rows += 1
            pieces = pieces_of(result, report)
            if pieces:
                if look is not None and result[0] is not None:
                    look(result[0], pieces)
                _take(pieces, renderer.options.max_length, truncate, examples, report)
        report.stated += [*rows.stated(), *renderer.stated(rows.shape.format)]
    if not skip_bad:
        report.raise_if_bad()
    if not len(examples):
        raise DataError(
            f"{', '.join(str(path) for path in files)}: no example is left of {report.rows} rows "
            f"({report.bad_count} bad, {report.dropped} dropped for their length)."
        )
    report.examples, report.tokens = len(examples), examples.tokens
    return examples, report


def pieces_of(result: tuple[Row | None, Any], report: LoadReport) -> list[Rendered]:
    """The pieces of a rendered row that can be trained; what cannot is told to ``report``."""
    row, found = result
    if isinstance(found, Bad):
        report.refuse(found)
        return []
    pieces: list[Rendered] = found
    if row is not None and not any(piece.trained or piece.lost for piece in pieces):
        report.refuse(Bad(row.source, row.key, f"nothing to learn: {_why_nothing(row)}"))
        return []
    report.notes.update({note for piece in pieces for note in piece.notes})
    return pieces


def _take(
    pieces: list[Rendered], limit: int | None, truncate: Truncate, examples: Examples, report: LoadReport
) -> None:
    longest = max(piece.length for piece in pieces)
    if limit is not None and longest > limit:
        if truncate == "error":
            reason = (
                f"{longest} tokens, and the maximum length is {limit}; shorten the row, or say what "
                "becomes of longer ones (truncate: end cuts them, drop leaves them out)"
            )
            report.refuse(Bad(pieces[0].source, "", reason))
            return
        if truncate == "drop":
            report.dropped += 1
            report.lost += sum(piece.trained + piece.lost for piece in pieces)
            return
        report.cut += 1
        report.lost += sum(piece.lost for piece in pieces)
    kept = [piece for piece in pieces if piece.trained]
    if not kept:
        report.refuse(Bad(pieces[0].source, "", f"nothing to learn within {limit} tokens: the answer lies behind them"))
        return
    for piece in kept:
        examples.append(piece.example)
        report.trained += piece.trained


def _why_nothing(row: Row) -> str:
    if row.kind != "chat":
        return "no token is trained"
    if any(message.get("role") == "assistant" for message in row.messages):
        return "every message of the assistant has weight 0"
    roles = dict.fromkeys(str(message.get("role")) for message in row.messages)
    return f"no message has the role assistant; the roles are {', '.join(roles)}"


class _Column:
    """A growing column of numbers that goes to a temporary file when it outgrows memory."""

    def __init__(self, code: Literal["i", "f"], dtype: type[np.generic]) -> None:
        self._code: Literal["i", "f"] = code
        self._dtype = np.dtype(dtype)
        self._recent = array(code)
        self._spilled = 0
        self._file: Any = None
        self._map: Any = None

    def extend(self, values: Iterable[float]) -> None:
        self._recent.extend(values)  # type: ignore[arg-type]  # ids are whole numbers
        if len(self._recent) * self._dtype.itemsize >= _SPILL:
            self._spill()

    def part(self, a: int, b: int) -> Iterator[Any]:
        if a >= self._spilled:
            return iter(self._recent[a - self._spilled : b - self._spilled])
        if self._map is None or len(self._map) < self._spilled:
            self._map = np.memmap(self._file, dtype=self._dtype, mode="r", shape=(self._spilled,))
        known = self._map[a : min(b, self._spilled)].tolist()
        return iter([*known, *self._recent[: max(0, b - self._spilled)]])

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="veneer-examples-")  # noqa: SIM115 (lives as long as this)
            weakref.finalize(self, self._file.close)
        self._recent.tofile(self._file)
        self._file.flush()
        self._spilled += len(self._recent)
        self._recent = array(self._code)
