"""Strict JSON parsing of rows: one line, or a whole array with the line at which each element begins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

__all__ = ["LINE_LIMIT", "array_rows", "describe", "is_array", "parse_json", "parse_row"]

LINE_LIMIT = 16 << 20
"""Maximum length of a line in bytes."""

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_NOT_JSON = re.compile(r"-?(NaN|Infinity|None|True|False|undefined)\b")
"""Values that other languages write in place of JSON's."""


def parse_row(line: bytes | str) -> dict[str, Any] | str:
    """Parse the JSON object of one row; returns the reason as text if there is none."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason = _reason(error)
        return reason if reason.startswith("not valid") else f"not valid JSON: {reason}"
    if not isinstance(value, dict):
        return f"expected a JSON object, found {describe(value)}"
    duplicate = _duplicate_key(line, value)
    return f"duplicate key {duplicate!r}" if duplicate else value


def parse_json(text: str) -> Any:
    """Parse a JSON value that a row holds as text.

    Raises:
        ValueError: the text is not valid JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(_reason(error)) from error


def array_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield each element of a JSON array with its line number; ends at the first position that is not valid JSON."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, "not valid UTF-8"
        return
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        yield text.count("\n", 0, at) + 1, "expected a JSON array of rows, or one JSON object per line"
        return
    at, line, counted = _skip_space(text, at + 1), 1, 0
    empty = text[at : at + 1] == "]"
    while not empty:
        line, counted = line + text.count("\n", counted, at), at
        try:
            _, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(": line ")[0]
            yield line, f"not valid JSON: {reason}; the rest of the file was not read"
            return
        yield line, parse_row(text[at:end])
        at = _skip_space(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line += text.count("\n", counted, at)
            yield line, "not valid JSON: expected a comma or a closing bracket; the rest of the file was not read"
            return
        at = _skip_space(text, at + 1)
    rest = _skip_space(text, at + 1)
    if rest < len(text):
        yield text.count("\n", 0, rest) + 1, "expected the end of the file after the array, found more text"


def is_array(path: Path) -> bool:
    """True if a file of a moderate size is one JSON array and not lines of JSON."""
    try:
        return path.stat().st_size <= LINE_LIMIT and isinstance(orjson.loads(path.read_bytes()), list)
    except (OSError, orjson.JSONDecodeError):
        return False


def describe(value: Any) -> str:
    """Describe a JSON value for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value!r}" if len(repr(value)) < 30 else "a number"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 40 else f"the text {value[:37]!r}..."
    if isinstance(value, (list, tuple)):
        return "an empty list" if not value else f"a list of {len(value)}"
    if isinstance(value, bytes):
        return "bytes"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _duplicate_key(line: bytes | str, value: dict[str, Any]) -> str:
    """A top-level key that the row gives twice (a parser keeps the last), or ""."""
    for key in value:
        quoted = f'"{key}"'
        if (line.count(quoted.encode()) if isinstance(line, bytes) else line.count(quoted)) > 1:
            break  # it may stand inside a string: parse again and compare
    else:
        return ""
    names: list[str] = []

    def remember(pairs: list[tuple[str, Any]]) -> None:
        names[:] = [name for name, _ in pairs]  # the outermost object comes last

    try:
        json.loads(line, object_pairs_hook=remember)
    except (ValueError, RecursionError):  # orjson accepted the row; do not refuse it here
        return ""
    return next((name for name in names if names.count(name) > 1), "")


def _reason(error: orjson.JSONDecodeError) -> str:
    reason = error.msg.split(": line ")[0]
    if "UTF-8" in reason:
        return "not valid UTF-8; save the file as UTF-8"
    found = _NOT_JSON.match(error.doc, error.pos - (error.doc[error.pos - 1 : error.pos] == "-"))
    if found:
        reason = f"{found.group()} is not a JSON value"
    hint = "; write null, or leave the key out" if found else ""
    return (f"{reason} (column {error.colno})" if error.lineno == 1 else reason) + hint
