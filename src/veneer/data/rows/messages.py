"""Checks of messages, tools and texts of a row; every error names the path of the key in the row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from veneer.data.rows.json_rows import describe, parse_json
from veneer.data.rows.row import BadRow

__all__ = [
    "MESSAGE_ROLES",
    "THINKING_KEYS",
    "Message",
    "RowErrors",
    "checked_messages",
    "checked_text",
    "checked_tools",
]

MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles that a message may have. The base's template may know fewer; rendering tells."""

THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which an assistant message may hold its reasoning."""

Message = dict[str, Any]

_TEXT_KEYS = ("name", "tool_call_id", *THINKING_KEYS)
_KEYS = ("role", "content", "weight", "tool_calls", *_TEXT_KEYS)
_ERRORS_PER_ROW = 10
_FORBIDDEN = re.compile("[\0\ufdd0-\ufdef]")  # NUL and Unicode noncharacters


class RowErrors:
    """Collects the errors of one row, at most ten."""

    def __init__(self, source: str, columns: Mapping[str, str]) -> None:
        self.source = source
        self.bad: list[BadRow] = []
        self._columns = columns

    def add(self, key: str, reason: str) -> None:
        """Add an error of ``key``, a path such as messages[2].content; it is reported under the file's column name."""
        column = key.partition("[")[0].partition(".")[0]
        if len(self.bad) < _ERRORS_PER_ROW:
            self.bad.append(BadRow(self.source, self.name(column) + key[len(column) :], reason))

    def __len__(self) -> int:
        return len(self.bad)

    def renamed(self, **columns: str) -> RowErrors:
        """A view that adds to the same list, with more of our columns under other names."""
        view = RowErrors(
            self.source, {**self._columns, **{ours: self.name(theirs) for ours, theirs in columns.items()}}
        )
        view.bad = self.bad
        return view

    def name(self, column: str) -> str:
        """The file's name of one of our columns."""
        return self._columns.get(column, column)


def checked_text(key: str, value: Any, errors: RowErrors, *, empty: bool = False) -> str | None:
    """Return the text if it can be tokenized, else None with an error added. ``empty``: allow white space only."""
    if not isinstance(value, str):
        errors.add(key, f"expected text, found {describe(value)}")
        return None
    if (found := _FORBIDDEN.search(value)) is not None:
        errors.add(key, _forbidden(found.group()))
        return None
    if not empty and not value.strip():
        errors.add(key, "expected text, found an empty one")
        return None
    return value


def checked_messages(key: str, value: Any, errors: RowErrors, *, shift: int = 0) -> tuple[list[Message], list[float]]:
    """Check messages and bring them into the form that chat templates take.

    Args:
        key: path of the list in the row.
        value: the list of messages.
        errors: collects errors.
        shift: number of messages that were inserted before those of the file, so that errors use the file's indices.

    Returns:
        The messages (content as one text, arguments of tool calls as objects, no weights), and a weight for each.
    """
    messages: list[Message] = []
    weights: list[float] = []
    if not isinstance(value, list):
        errors.add(key, f"expected a list of messages, found {describe(value)}")
    elif not value:
        errors.add(key, "expected at least one message, found an empty list")
    else:
        for k, message in enumerate(value):
            path = f"{key}[{k - shift}]" if k >= shift else key
            if not isinstance(message, dict):
                errors.add(path, f"expected an object with role and content, found {describe(message)}")
                continue
            weights.append(_weight(path, message, errors))
            messages.append(_message(path, message, errors, trained=weights[-1] > 0.0))
    return messages, weights


def checked_tools(key: str, value: Any, errors: RowErrors) -> list[dict[str, Any]] | None:
    """Check tools: a list of JSON schemas of functions, or None if the row has none."""
    if value is None:
        return None
    if not isinstance(value, list):
        errors.add(key, f"expected a list of tools, found {describe(value)}")
        return None
    for k, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            errors.add(f"{key}[{k}]", f"expected an object with a function and its name, found {describe(tool)}")
        _check_texts(f"{key}[{k}]", tool, errors)
    return [_without_null_keywords(tool) for tool in value] or None


def _without_null_keywords(schema: Any) -> Any:
    """Remove null keywords of a JSON schema, which exports from Arrow add; a default or constant may be null."""
    if isinstance(schema, dict):
        return {k: _without_null_keywords(v) for k, v in schema.items() if v is not None or k in ("default", "const")}
    return [_without_null_keywords(item) for item in schema] if isinstance(schema, list) else schema


def _message(path: str, message: Message, errors: RowErrors, *, trained: bool) -> Message:
    _check_similar_keys(path, message, errors)
    role = _role(path, message, errors)
    checked: Message = {"role": role}
    calls = message.get("tool_calls")
    empty = role != "assistant" or not trained or bool(calls) or any(message.get(name) for name in THINKING_KEYS)
    if "content" in message and not (message["content"] is None and calls):
        checked["content"] = _content(f"{path}.content", message["content"], errors, empty=empty)
    elif calls:
        checked["content"] = ""
    else:
        errors.add(f"{path}.content", f"missing; the message has {_keys_of(message)}")
    for name, value in message.items():
        if name in ("role", "content", "weight") or value is None:
            continue
        if name == "tool_calls":
            checked[name] = _tool_calls(f"{path}.{name}", value, errors)
        elif name in _TEXT_KEYS:
            checked[name] = checked_text(f"{path}.{name}", value, errors, empty=True)
        else:
            _check_texts(f"{path}.{name}", value, errors)
            checked[name] = value
    return checked


def _role(path: str, message: Message, errors: RowErrors) -> str:
    role = message.get("role")
    if isinstance(role, str) and role in MESSAGE_ROLES:
        return role
    if "role" not in message:
        errors.add(f"{path}.role", f"missing; the message has {_keys_of(message)}")
    else:
        close = difflib.get_close_matches(role, MESSAGE_ROLES, n=1) if isinstance(role, str) else []
        hint = f"; did you mean {close[0]}?" if close else ""
        errors.add(f"{path}.role", f"expected {', '.join(MESSAGE_ROLES)}, found {describe(role)}{hint}")
    return ""


def _weight(path: str, message: Message, errors: RowErrors) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight not in (0, 1):
        errors.add(f"{path}.weight", f"expected 0 or 1, found {describe(weight)}")
        return 0.0
    if weight and message.get("role") != "assistant":
        role = describe(message.get("role"))
        errors.add(f"{path}.weight", f"only an assistant's message can be trained; the role of this one is {role}")
    return float(weight)


def _content(path: str, value: Any, errors: RowErrors, *, empty: bool) -> str:
    if not isinstance(value, list):
        return checked_text(path, value, errors, empty=empty) or ""
    parts = []
    for k, part in enumerate(value):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict) or part.get("type", "text") != "text" or "text" not in part:
            found = describe(part.get("type")) if isinstance(part, dict) and "type" in part else describe(part)
            errors.add(f"{path}[{k}]", f"expected a part of type text with a text, found {found}")
            continue
        parts.append(checked_text(f"{path}[{k}].text", part["text"], errors, empty=True) or "")
    text = "".join(parts)
    if not empty and not text.strip() and not errors:
        errors.add(path, "expected text, found an empty one")
    return text


def _tool_calls(path: str, value: Any, errors: RowErrors) -> list[Any]:
    if not isinstance(value, list):
        errors.add(path, f"expected a list of calls, found {describe(value)}")
        return []
    calls = []
    for k, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            found = describe(call)
            errors.add(f"{path}[{k}]", f"expected an object with a function, its name and arguments, found {found}")
            continue
        arguments = {} if function.get("arguments") is None else function["arguments"]
        if isinstance(arguments, str):  # templates write arguments as JSON themselves
            try:
                arguments = parse_json(arguments) if arguments.strip() else {}
            except ValueError as error:
                errors.add(f"{path}[{k}].function.arguments", f"not valid JSON: {error}")
        if not isinstance(arguments, dict):
            errors.add(f"{path}[{k}].function.arguments", f"expected an object, found {describe(arguments)}")
        _check_texts(f"{path}[{k}]", arguments, errors)
        function = {key: item for key, item in function.items() if item is not None} | {"arguments": arguments}
        rest = {k: v for k, v in call.items() if v is not None} if "function" in call else {"type": "function"}
        calls.append({**rest, "function": function})
    return calls


def _check_similar_keys(path: str, message: Message, errors: RowErrors) -> None:
    """Refuse a misspelt key such as "wieght", which would have no effect."""
    for name in message:
        if name not in _KEYS and (close := difflib.get_close_matches(str(name), _KEYS, n=1, cutoff=0.8)):
            errors.add(f"{path}.{name}", f"unknown key; did you mean {close[0]}?")


def _keys_of(message: Message) -> str:
    return ", ".join(map(str, message)) or "no key"


def _forbidden(character: str) -> str:
    name = "NUL characters" if character == "\0" else f"U+{ord(character):04X}, a Unicode noncharacter"
    return f"expected text without {name}; remove it"


def _check_texts(path: str, value: Any, errors: RowErrors) -> None:
    """Check every text in a nested value for forbidden characters."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str) and (found := _FORBIDDEN.search(item)) is not None:
            errors.add(path, _forbidden(found.group()))
            return
        if isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, list):
            pending += item
