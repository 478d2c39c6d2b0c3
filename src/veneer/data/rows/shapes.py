"""Row shapes: the meanings of a file's columns, detected from the column names.

    messages    messages: [{role, content, weight?, tool_calls?, name?}], tools?, system?  a conversation
    sharegpt    conversations: [{from, value}], system?, tools?                          a conversation
    prompt      prompt, completion: two texts, or two lists of messages; system?         only the completion is trained
    alpaca      instruction, output, input?, system?, history?: [[question, answer]]     a conversation
    text        text                                                                     all of it is trained
    preference  chosen, rejected, prompt?, tools?, system?                               the two answers are compared
    unpaired    prompt, completion, label, tools?, system?                               answers to learn or avoid (only if requested)
    labelled    text: one text or two, text_pair?, label?                                a head reads it (only if requested)

A file with other column names is read with a mapping from our names to the file's, ``{"prompt": "question",
"completion": "answer"}``. The first readable row determines the shape of the file; a later row without the needed columns
is bad. Columns that the shape does not use are reported and ignored, except for images and the like: such rows are bad.

Rows are checked here without a tokenizer; ``chat/render.py`` checks the rest.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.data.rows.columns import CONVERTERS, TAGS, ColumnValues
from veneer.data.rows.json_rows import is_array
from veneer.data.rows.memory_rows import title_of
from veneer.data.rows.messages import RowErrors
from veneer.data.rows.preference import preference, unpaired
from veneer.data.rows.readers import RecordReader
from veneer.data.rows.row import BadRow, Record, Row
from veneer.errors import ConfigError, DataError

__all__ = ["FORMATS", "RowReader", "RowShape"]

_REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "labelled": ("text",),
}
_OPTIONAL = {
    "messages": ("tools", "system"),
    "sharegpt": ("system", "tools"),
    "prompt": ("tools", "system"),
    "alpaca": ("input", "system", "history"),
    "text": (),
    "preference": ("prompt", "tools", "system"),
    "unpaired": ("tools", "system"),
    "labelled": ("text_pair", "label"),
}
_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
"""Columns of what a text model cannot read."""
_PREFERENCES = {"preference": preference, "unpaired": unpaired}
FORMATS = tuple(_REQUIRED)
"""The names of the shapes."""

_ALIASES = {
    "prompt": ["question", "query", "problem", "source", "input", "context", "user", "request", "src", "mr"],
    "completion": [
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
    ],
    "text": ["content", "body", "document", "sentence", "sentence1", "premise", "question", "tokens", "raw"],
    "messages": ["conversation", "dialog", "dialogue", "chat", "message", "turns"],
}
_LISTED = 12  # columns that a message names
_UNREADABLE = 20  # bad rows at the beginning of a file after which it is refused


@dataclass(frozen=True, slots=True)
class RowShape:
    """The meaning of a file's columns.

    Attributes:
        format: one of ``FORMATS``.
        reason: why this shape was chosen, as a clause.
        columns: our names to the file's, where they differ.
        unused: columns of the file that the shape does not use.
        implicit_prompt: preferences have no column for the prompt.
    """

    format: str
    reason: str
    columns: Mapping[str, str]
    unused: tuple[str, ...] = ()
    implicit_prompt: bool = False

    def describe(self, unused: Mapping[str, int] | None = None, rows: int = 0) -> str:
        """Describe the detected shape in one line. ``unused``: the number of ``rows`` with each column that is not used."""
        text = f"format {self.format} ({self.reason})"
        if self.columns:
            text += "; " + ", ".join(f"{ours} is column {theirs}" for ours, theirs in self.columns.items())
        if self.format == "alpaca":
            text += "; answers in history are trained like the others"
        if self.format == "preference" and self.implicit_prompt:
            text += "; the prompt is what chosen and rejected begin with"
        counted = {**dict.fromkeys(self.unused, rows), **(unused or {})}
        if counted:
            names = [name if n == rows else f"{name} ({n:,} of {rows:,} rows)" for name, n in counted.items()]
            text += f"; not used: {', '.join(names[:_LISTED])}" + (" and more" if len(names) > _LISTED else "")
        return text


class RowReader:
    """Reads and checks the rows of one file; each iteration starts at the beginning of the file.

    Args:
        path: the file.
        format: one of ``FORMATS``, or "auto" to detect it from the columns.
        columns: our column names to the file's.
        roles: ShareGPT tags of the file to roles, in addition to the usual ones.

    Attributes:
        records: the reader of the file's raw records.
        shape: the meaning of its columns.

    Raises:
        DataError: the file cannot be read, or its columns match no shape.
        ConfigError: ``format``, ``columns`` or ``roles`` hold an unknown name.
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
        self.records = RecordReader(path)
        self.path = Path(path)
        self._columns = dict(columns or {})
        self._tags = {**TAGS, **(roles or {})}
        self.shape = self._detect(format)
        self._rows = 0
        self._unused: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row | BadRow]:
        self._rows, self._unused = 0, Counter()
        for record in self.records:
            if isinstance(record, BadRow):
                yield record
            else:
                yield from self._convert(record)

    def notices(self) -> list[str]:
        """Facts that were detected about the file and the rows that were read, one line each."""
        shape = self.shape.describe(self._unused, self._rows)
        return [f"{title_of(self.path)}: {text}" for text in [shape, *dict.fromkeys(self.records.notices)]]

    def _convert(self, record: Record) -> list[Row | BadRow]:
        columns = self._renamed(record.values)
        errors = RowErrors(record.source, self._columns)
        known = (*_REQUIRED[self.shape.format], *_OPTIONAL[self.shape.format])
        unused = [name for name in columns if name not in known]
        self._rows += 1
        self._unused.update(unused)
        for key in unused:
            if key in _MEDIA and columns[key]:
                errors.add(
                    key,
                    "only text can be trained; leave the row out, or the column if the text is to be trained without it",
                )
        for key in _REQUIRED[self.shape.format]:
            if key not in columns:
                errors.add(key, f"missing; the row has {_listed(record.values)}")
        if not errors:
            convert = _PREFERENCES.get(self.shape.format) or CONVERTERS[self.shape.format]
            row = convert(record.source, ColumnValues(columns, errors, self._tags))
            if row is not None and not errors:
                return [row]
        return list(dict.fromkeys(errors.bad))  # a bad prompt is found with both answers of a preference

    def _detect(self, format: str) -> RowShape:
        bad: list[BadRow] = []
        for record in self.records:
            if isinstance(record, Record):
                return _shape_of(record, format, self._columns)
            bad.append(record)
            if len(bad) == _UNREADABLE:
                break
        if not bad:
            raise DataError(f"{self.path}: the file has no rows; expected at least one")
        which = "the first row cannot" if len(bad) == 1 else f"none of the first {len(bad)} rows can"
        raise DataError(f"{self.path}: {which} be read: {bad[0]}{self._form(bad[0].reason)}")

    def _form(self, reason: str) -> str:
        """The form that the file should have, to append to the first problem if that does not say what to do."""
        if ";" in reason or reason.startswith("duplicate key"):
            return ""
        if self.records.container not in ("jsonl", "json"):
            return "; expected rows under column names"
        if self.records.container == "jsonl" and is_array(self.path):
            return f"; the file is one JSON array: rename it to {self.path.stem}.json"
        return "; expected one JSON object per line"

    def _renamed(self, values: Mapping[str, object]) -> dict[str, object]:
        if not self._columns:
            return dict(values)
        theirs = set(self._columns.values())
        renamed = {key: value for key, value in values.items() if key not in theirs}
        renamed.update({ours: values[name] for ours, name in self._columns.items() if name in values})
        return renamed


def _check_options(format: str, columns: Mapping[str, str], roles: Mapping[str, str]) -> None:
    if format != "auto" and format not in FORMATS:
        raise ConfigError(
            f"format: expected auto, {', '.join(FORMATS)}, found {format!r}{_suggestion(format, FORMATS)}"
        )
    known = list(dict.fromkeys(name for names in (*_REQUIRED.values(), *_OPTIONAL.values()) for name in names))
    for ours, theirs in columns.items():
        if ours in known:
            continue
        hint = f"; the mapping goes from our name to yours: {theirs}={ours}" if theirs in known else ""
        hint = hint or _suggestion(ours, known) or f"; expected one of {', '.join(known)}"
        raise ConfigError(f"columns: unknown column name {ours!r}{hint}")
    for tag, role in roles.items():
        if role not in TAGS.values():
            expected = ", ".join(dict.fromkeys(TAGS.values()))
            raise ConfigError(f"roles: expected {expected} for the tag {tag!r}, found {role!r}")


def _shape_of(record: Record, format: str, columns: Mapping[str, str]) -> RowShape:
    found = list(record.values)
    for ours, theirs in columns.items():
        if theirs not in found:
            hint = _suggestion(theirs, found, prefix=f"{ours}=")
            raise DataError(
                f"{record.source}: columns: no column {theirs!r} to use as {ours}; the file has "
                f"{_listed(record.values)}{hint}"
            )
    back = {theirs: ours for ours, theirs in columns.items()}
    names = [back.get(name, name) for name in found]
    if format != "auto":
        missing = [key for key in _REQUIRED[format] if key not in names]
        if missing:
            raise DataError(
                f"{record.source}: format {format} needs the column{'s' if len(missing) > 1 else ''} "
                f"{' and '.join(missing)}; the file has {_listed(record.values)}; {_remedy(names, format)}"
            )
        return _shape(format, "as requested", names, columns)
    for name, required in _REQUIRED.items():
        # An answer that others reject must not be trained by mistake, so preferences are read only where they are asked for.
        if name != "preference" and all(key in names for key in required):
            return _shape(name, f"the rows have {' and '.join(required)}", names, columns)
    raise DataError(
        f"{record.source}: unknown columns: expected messages, conversations, prompt and completion, instruction and "
        f"output, or text, found {_listed(record.values)}; {_remedy(names, '')}"
    )


def _shape(format: str, reason: str, names: list[str], columns: Mapping[str, str]) -> RowShape:
    known = (*_REQUIRED[format], *_OPTIONAL[format])
    mapped = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return RowShape(format, reason, mapped, tuple(name for name in names if name not in known), "prompt" not in names)


def _remedy(names: list[str], format: str) -> str:
    """Suggest a column mapping that would read the file."""
    if not format and {"chosen", "rejected"} <= set(names):
        mapping = "completion=chosen" if "prompt" in names else "messages=chosen"
        return (
            f"to train on preferences, pass --task dpo; to train on the chosen answers only, pass --columns {mapping}"
        )
    for required in (_REQUIRED[format],) if format else (("prompt", "completion"), ("messages",), ("text",)):
        guess: dict[str, str] = {}
        for ours in required:
            close = [ours] if ours in names else difflib.get_close_matches(ours, names, n=1, cutoff=0.8)
            options = [*close, *(name for name in _ALIASES.get(ours, ()) if name in names)]
            free = [name for name in options if name not in guess.values()]
            if free:
                guess[ours] = free[0]
        if len(guess) == len(required):
            return f"to read it, pass --columns {_quoted(','.join(f'{a}={b}' for a, b in guess.items() if a != b))}"
    if not format and len(names) == 2:
        return (
            f"if {names[0]} is the question and {names[1]} the answer, pass "
            f"--columns {_quoted(f'prompt={names[0]},completion={names[1]}')}"
        )
    example = {"prompt": "QUESTION", "completion": "ANSWER", "chosen": "BETTER", "rejected": "WORSE"}
    missing = [name for name in _REQUIRED[format] if name not in names] if format else ["prompt", "completion"]
    given = ",".join(f"{name}={example.get(name, name.upper())}" for name in missing)
    return f"name the columns with --columns, for example --columns {given}"


def _quoted(words: str) -> str:
    return shlex.quote(words) if " " in words else words


def _suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _listed(values: Mapping[str, object]) -> str:
    names = [str(name) for name in values]
    if not names:
        return "no columns"
    shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:_LISTED])
    return (
        ("the column " if len(names) == 1 else "the columns ") + shown + (" and more" if len(names) > _LISTED else "")
    )
