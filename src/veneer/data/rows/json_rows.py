"""Rows out of JSON text, strictly: the bytes of a line, or a whole array with the line that each element begins in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson

__all__ = ["LINE_CAP", "array_rows", "parse_json", "parse_row"]

LINE_CAP = 16 << 20
"""Bytes of a line, at most."""

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def parse_row(line: bytes | str) -> dict[str, Any] | str:
    """The object that a line holds, or the reason why it is none."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not valid JSON: {_plain(error)}"
    if not isinstance(value, dict):
        return f"expected an object of columns in braces, found {kind(value)}"
    twice = _given_twice(line, value)
    return f"key {twice!r} is given twice" if twice else value


def parse_json(text: str) -> Any:
    """Any JSON value from a text inside a row.

    Raises:
        ValueError: it is not valid JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(_plain(error)) from error


def array_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each element of a JSON array with the line that it begins in; ends at the first place that is no JSON."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, "not valid UTF-8"
        return
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        yield text.count("\n", 0, at) + 1, "expected an array of rows in square brackets, or one object a line"
        return
    at, line, seen = _after_space(text, at + 1), 1, 0
    empty = text[at : at + 1] == "]"
    while not empty:
        line, seen = line + text.count("\n", seen, at), at
        try:
            _, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, f"not valid JSON: {_first(error)}; the rest of the file was not read"
            return
        yield line, parse_row(text[at:end])
        at = _after_space(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line += text.count("\n", seen, at)
            yield (
                line,
                "not valid JSON: expected a comma or a closing square bracket; the rest of the file was not read",
            )
            return
        at = _after_space(text, at + 1)
    rest = _after_space(text, at + 1)
    if rest < len(text):
        yield text.count("\n", 0, rest) + 1, "expected the end of the file after the array, found more"


def kind(value: Any) -> str:
    """What a JSON value is, in the words of an error."""
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
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _given_twice(line: bytes | str, value: dict[str, Any]) -> str:
    """A key that the object gives twice, of which a parser keeps the last; "" if there is none."""
    for key in value:
        quoted = f'"{key}"'
        if (line.count(quoted.encode()) if isinstance(line, bytes) else line.count(quoted)) > 1:
            break  # perhaps only inside a text: look closely
    else:
        return ""
    names: list[str] = []

    def remember(pairs: list[tuple[str, Any]]) -> None:
        names[:] = [name for name, _ in pairs]  # the outermost object is finished last

    try:
        json.loads(line, object_pairs_hook=remember)
    except (ValueError, RecursionError):  # the strict parser took it; a doubt is no reason to refuse the row
        return ""
    return next((name for name in names if names.count(name) > 1), "")


def _plain(error: orjson.JSONDecodeError) -> str:
    words = error.msg.split(": line ")[0]
    return f"{words} (column {error.colno})" if error.lineno == 1 else words


def _first(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).split(": line ")[0]
