"""What the columns of a file mean: five shapes, recognised by their columns and stated with the reason.

    messages    messages: [{role, content, weight?, tool_calls?, name?}], tools?         a conversation
    sharegpt    conversations: [{from, value}], system?, tools?                          a conversation
    prompt      prompt, completion: two texts, or two lists of messages                  only the completion is trained
    alpaca      instruction, output, input?, system?, history?: [[asked, answered], ...] a conversation
    text        text                                                                     all of it is trained

Files with other column names are read with a map from ours to theirs, ``{"prompt": "question", "completion":
"answer"}``. The shape is taken from the first readable row and holds for the file: a row that does not fit is bad. Columns
that have no part in the shape are told and not used.

Boundary: a row is checked here for what it is, not for what a tokenizer makes of it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.data.rows.columns import CONVERTERS, TAGS, Faults, Values
from veneer.data.rows.readers import Source
from veneer.data.rows.row import Bad, Record, Row
from veneer.errors import ConfigError, DataError

__all__ = ["FORMATS", "Rows", "Shape"]

_NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_OPTIONAL = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "prompt": ("tools",),
    "alpaca": ("input", "system", "history"),
    "text": (),
}
FORMATS = tuple(_NEEDED)
"""The names of the shapes."""

_ALIASES = {
    "prompt": ("question", "query", "problem", "source", "input", "context", "user", "request", "src", "mr"),
    "completion": (
        "answer",
        "response",
        "output",
        "solution",
        "target",
        "reply",
        "assistant",
        "ref",
        "summary",
        "label",
    ),
    "text": ("content", "body", "document", "sentence", "raw"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "message", "turns"),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a file's columns mean.

    Attributes:
        format: one of ``FORMATS``.
        reason: why it was taken, as a clause.
        columns: our names to the file's, as far as they differ.
        unused: columns of the file that have no part in the shape.
    """

    format: str
    reason: str
    columns: Mapping[str, str]
    unused: tuple[str, ...] = ()

    def stated(self) -> str:
        """One line that tells the user what was recognised."""
        text = f"format {self.format} ({self.reason})"
        if self.columns:
            text += "; " + ", ".join(f"{ours} is column {theirs}" for ours, theirs in self.columns.items())
        if self.format == "alpaca":
            text += "; answers in history are trained like the others"
        if self.unused:
            text += f"; not used: {', '.join(self.unused)}"
        return text


class Rows:
    """The rows of one file, checked; iterating reads the file from its start.

    Args:
        path: the file.
        format: one of ``FORMATS``, or "auto" to take it from the columns.
        columns: our column names to the file's.
        roles: the file's sharegpt tags to roles, beside the usual ones.

    Attributes:
        source: the file.
        shape: what its columns mean.

    Raises:
        DataError: the file cannot be read, or its columns are not understood.
        ConfigError: ``format``, ``columns`` or ``roles`` name something unknown.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        _check_options(format, columns or {}, roles or {})
        self.source = Source(path)
        self.path = Path(path)
        self._columns = dict(columns or {})
        self._tags = {**TAGS, **(roles or {})}
        self.shape = self._recognise(format)

    def __iter__(self) -> Iterator[Row | Bad]:
        for record in self.source:
            if isinstance(record, Bad):
                yield record
            else:
                yield from self.convert(record)

    def convert(self, record: Record) -> list[Row | Bad]:
        """The row that a record holds, or all that is wrong with it."""
        values = self._renamed(record.values)
        faults = Faults(record.source, self._columns)
        for key in _NEEDED[self.shape.format]:
            if key not in values:
                faults.add(key, f"missing; the row has {_listed(record.values)}")
        if not faults:
            row = CONVERTERS[self.shape.format](record.source, Values(values, faults, self._tags))
            if row is not None and not faults:
                return [row]
        return list(faults.bad)

    def stated(self) -> list[str]:
        """What was recognised about the file, a line each."""
        return [f"{self.path.name}: {text}" for text in [self.shape.stated(), *dict.fromkeys(self.source.notes)]]

    def _recognise(self, format: str) -> Shape:
        bad: list[Bad] = []
        for record in self.source:
            if isinstance(record, Record):
                return _shape_of(record, format, self._columns)
            bad.append(record)
            if len(bad) == 20:
                break
        if not bad:
            raise DataError(f"{self.path}: the file holds no row; expected at least one.")
        raise DataError(
            f"{self.path}: none of the first {len(bad)} rows can be read; the first: {bad[0]}. Expected "
            + ("one JSON object a line." if self.source.container in ("jsonl", "json") else "rows under column names.")
        )

    def _renamed(self, values: Mapping[str, object]) -> dict[str, object]:
        if not self._columns:
            return dict(values)
        theirs = set(self._columns.values())
        renamed = {key: value for key, value in values.items() if key not in theirs}
        renamed.update({ours: values[name] for ours, name in self._columns.items() if name in values})
        return renamed


def _check_options(format: str, columns: Mapping[str, str], roles: Mapping[str, str]) -> None:
    if format != "auto" and format not in FORMATS:
        close = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ConfigError(f"format: expected auto, {', '.join(FORMATS)}, found {format!r}{hint}")
    known = list(dict.fromkeys(name for names in (*_NEEDED.values(), *_OPTIONAL.values()) for name in names))
    for ours in columns:
        if ours not in known:
            if columns[ours] in known:
                hint = f"; the map goes from our name to yours: {columns[ours]}={ours}"
            else:
                close = difflib.get_close_matches(ours, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; ours are {', '.join(known)}"
            raise ConfigError(f"columns: {ours!r} is none of our column names{hint}")
    for tag, role in roles.items():
        if role not in TAGS.values():
            raise ConfigError(
                f"roles: expected {', '.join(dict.fromkeys(TAGS.values()))} for the tag {tag!r}, found {role!r}."
            )


def _shape_of(record: Record, format: str, columns: Mapping[str, str]) -> Shape:
    found = list(record.values)
    for ours, theirs in columns.items():
        if theirs not in found:
            close = difflib.get_close_matches(theirs, found, n=1)
            hint = f"; did you mean {ours}={close[0]}?" if close else "."
            raise DataError(
                f"{record.source}: columns: there is no column {theirs!r} to take for {ours}; the file has "
                f"{_listed(record.values)}{hint}"
            )
    back = {theirs: ours for ours, theirs in columns.items()}
    names = [back.get(name, name) for name in found]
    if format != "auto":
        missing = [key for key in _NEEDED[format] if key not in names]
        if missing:
            raise DataError(
                f"{record.source}: format {format} needs the column{'s' if len(missing) > 1 else ''} "
                f"{' and '.join(missing)}, and the file has {_listed(record.values)}.{_remedy(names, format)}"
            )
        return _shape(format, "as asked for", names, columns)
    for name, needed in _NEEDED.items():
        if all(key in names for key in needed):
            return _shape(name, f"the rows have {' and '.join(needed)}", names, columns)
    raise DataError(
        f"{record.source}: the columns are not understood: the file has {_listed(record.values)}; expected messages, "
        "conversations, prompt and completion, instruction and output, or text." + _remedy(names, "")
    )


def _shape(format: str, reason: str, names: list[str], columns: Mapping[str, str]) -> Shape:
    known = (*_NEEDED[format], *_OPTIONAL[format])
    mapped = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return Shape(format, reason, mapped, tuple(name for name in names if name not in known))


def _remedy(names: list[str], format: str) -> str:
    """A column map that would read the file, where one can be guessed."""
    if not format and {"chosen", "rejected"} <= set(names):
        return (
            " Preferences (chosen and rejected) are not trained; to learn the chosen answers alone, give --columns "
            + ("completion=chosen" if "prompt" in names else "messages=chosen")
        )
    for wanted in (_NEEDED[format],) if format else (("prompt", "completion"), ("messages",), ("text",)):
        guess: dict[str, str] = {}
        for ours in wanted:
            near = difflib.get_close_matches(ours, names, n=1, cutoff=0.8)
            options = [
                *([ours] if ours in names else near),
                *(name for name in _ALIASES.get(ours, ()) if name in names),
            ]
            free = [name for name in options if name not in guess.values()]
            if free:
                guess[ours] = free[0]
        if len(guess) == len(wanted):
            return f" To read it, give --columns {','.join(f'{a}={b}' for a, b in guess.items() if a != b)}"
    if not format and len(names) == 2:
        return f" If {names[0]} asks and {names[1]} answers, give --columns prompt={names[0]},completion={names[1]}"
    return " Name the columns with --columns, for instance --columns prompt=QUESTION,completion=ANSWER"


def _listed(values: Mapping[str, object]) -> str:
    names = [str(name) for name in values]
    if not names:
        return "no columns"
    shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:12])
    return ("the column " if len(names) == 1 else "the columns ") + shown + (" and more" if len(names) > 12 else "")
