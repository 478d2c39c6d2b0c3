"""Messages, tools and texts of a row: checked key by key, every fault with the place in the row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.data.rows.json_rows import kind, parse_json
from veneer.data.rows.row import Bad

__all__ = ["MESSAGE_ROLES", "Faults", "Messages", "checked_messages", "checked_text", "checked_tools"]

MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles that a message may have; whether a base's template knows a role shows when it is rendered."""

_KEYS = (
    "role",
    "content",
    "weight",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "thinking",
    "reasoning",
)
_TEXT_KEYS = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")
_FAULTS_OF_A_ROW = 10
_FORBIDDEN = re.compile("[\0\ufdd0-\ufdef]")  # no text to learn: a C string's end, and noncharacters


class Faults:
    """All that is wrong with one row, up to ten things."""

    def __init__(self, source: str, columns: Mapping[str, str]) -> None:
        self.source = source
        self.bad: list[Bad] = []
        self._columns = columns

    def add(self, key: str, reason: str) -> None:
        """Note a fault of ``key``, a path such as messages[2].content; told under the file's own column name."""
        column = key.partition("[")[0].partition(".")[0]
        if len(self.bad) < _FAULTS_OF_A_ROW:
            self.bad.append(Bad(self.source, self.name(column) + key[len(column) :], reason))

    def __len__(self) -> int:
        return len(self.bad)

    def name(self, column: str) -> str:
        """The file's own name of a column."""
        return self._columns.get(column, column)


@dataclass(slots=True)
class Messages:
    """Checked messages, and for each whether it is to be trained."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def checked_text(key: str, value: Any, faults: Faults, *, empty: bool = False) -> str | None:
    """A text that can be tokenised, or None with the fault noted."""
    if not isinstance(value, str):
        faults.add(key, f"expected text, found {kind(value)}")
        return None
    if (found := _FORBIDDEN.search(value)) is not None:
        faults.add(key, _forbidden(found.group()))
        return None
    if not empty and not value.strip():
        faults.add(key, "expected text, found an empty one")
        return None
    return value


def checked_messages(key: str, value: Any, faults: Faults, *, shift: int = 0) -> Messages:
    """Messages as chat templates take them: content as one text, arguments of calls as objects, no weights.

    Args:
        key: the path of the list in the row.
        value: what stands there.
        faults: where faults are noted.
        shift: how many messages stand before the file's own, so that faults are numbered as the file numbers.
    """
    checked = Messages()
    if not isinstance(value, list):
        faults.add(key, f"expected a list of messages, found {kind(value)}")
        return checked
    if not value:
        faults.add(key, "expected at least one message, found an empty list")
        return checked
    for k, message in enumerate(value):
        place = f"{key}[{k - shift}]" if k >= shift else key
        if not isinstance(message, dict):
            faults.add(place, f"expected an object with role and content, found {kind(message)}")
            continue
        checked.weights.append(_weight(place, message, faults))
        checked.messages.append(_message(place, message, faults, wanted=checked.weights[-1] > 0.0))
    return checked


def checked_tools(key: str, value: Any, faults: Faults) -> list[dict[str, Any]] | None:
    """Tools as a list of JSON schemas of functions, or None where the row has none."""
    if value is None:
        return None
    if not isinstance(value, list):
        faults.add(key, f"expected a list of tools, found {kind(value)}")
        return None
    for k, tool in enumerate(value):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            faults.add(f"{key}[{k}]", f"expected an object with a function and its name, found {kind(tool)}")
        _all_texts(f"{key}[{k}]", tool, faults)
    return value or None


def _message(place: str, message: dict[str, Any], faults: Faults, *, wanted: bool) -> dict[str, Any]:
    _near_misses(place, message, faults)
    role = _role(place, message, faults)
    checked: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls")
    thought = any(message.get(name) for name in ("reasoning_content", "thinking", "reasoning"))
    empty = role != "assistant" or not wanted or bool(calls) or thought
    if "content" in message and not (message["content"] is None and calls):
        checked["content"] = _content(f"{place}.content", message["content"], faults, empty=empty)
    elif calls:
        checked["content"] = ""
    else:
        faults.add(f"{place}.content", f"missing; the message has {', '.join(map(str, message)) or 'no key'}")
    for name, value in message.items():
        if name in ("role", "content", "weight") or value is None:
            continue
        if name == "tool_calls":
            checked[name] = _tool_calls(f"{place}.{name}", value, faults)
        elif name in _TEXT_KEYS:
            checked[name] = checked_text(f"{place}.{name}", value, faults, empty=True)
        else:
            _all_texts(f"{place}.{name}", value, faults)
            checked[name] = value
    return checked


def _role(place: str, message: dict[str, Any], faults: Faults) -> str:
    role = message.get("role")
    if isinstance(role, str) and role in MESSAGE_ROLES:
        return role
    if "role" not in message:
        faults.add(f"{place}.role", f"missing; the message has {', '.join(map(str, message)) or 'no key'}")
    else:
        close = difflib.get_close_matches(role, MESSAGE_ROLES, n=1) if isinstance(role, str) else []
        hint = f"; did you mean {close[0]}?" if close else ""
        faults.add(f"{place}.role", f"expected {', '.join(MESSAGE_ROLES)}, found {kind(role)}{hint}")
    return ""


def _weight(place: str, message: dict[str, Any], faults: Faults) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight not in (0, 1):
        faults.add(f"{place}.weight", f"expected 0 or 1, found {kind(weight)}")
        return 0.0
    if weight and message.get("role") != "assistant":
        faults.add(
            f"{place}.weight", f"only an assistant's message can be trained, and this is {kind(message.get('role'))}"
        )
    return float(weight)


def _content(place: str, value: Any, faults: Faults, *, empty: bool) -> str:
    if not isinstance(value, list):
        text = checked_text(place, value, faults, empty=empty)
        return text or ""
    parts = []
    for k, part in enumerate(value):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict) or part.get("type", "text") != "text" or "text" not in part:
            found = kind(part.get("type")) if isinstance(part, dict) and "type" in part else kind(part)
            faults.add(f"{place}[{k}]", f"expected a part of type text with a text, found {found}")
            continue
        parts.append(checked_text(f"{place}[{k}].text", part["text"], faults, empty=True) or "")
    text = "".join(parts)
    if not empty and not text.strip() and not faults:
        faults.add(place, "expected text, found an empty one")
    return text


def _tool_calls(place: str, value: Any, faults: Faults) -> list[Any]:
    if not isinstance(value, list):
        faults.add(place, f"expected a list of calls, found {kind(value)}")
        return []
    calls = []
    for k, call in enumerate(value):
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            faults.add(
                f"{place}[{k}]", f"expected an object with a function, its name and arguments, found {kind(call)}"
            )
            continue
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):  # templates write arguments as JSON themselves
            try:
                arguments = parse_json(arguments) if arguments.strip() else {}
            except ValueError as error:
                faults.add(f"{place}[{k}].function.arguments", f"not valid JSON: {error}")
        if not isinstance(arguments, dict):
            faults.add(f"{place}[{k}].function.arguments", f"expected an object, found {kind(arguments)}")
        _all_texts(f"{place}[{k}]", arguments, faults)
        function = {**inner, "arguments": arguments}
        calls.append(
            {**call, "function": function} if "function" in call else {"type": "function", "function": function}
        )
    return calls


def _near_misses(place: str, message: dict[str, Any], faults: Faults) -> None:
    """A key like "wieght" would change nothing and say nothing, so it is a fault."""
    for name in message:
        if name not in _KEYS and (close := difflib.get_close_matches(str(name), _KEYS, n=1, cutoff=0.8)):
            faults.add(f"{place}.{name}", f"unknown key; did you mean {close[0]}?")


def _forbidden(character: str) -> str:
    name = (
        "NUL characters" if character == "\0" else f"U+{ord(character):04X}, which Unicode keeps for programs' own use"
    )
    return f"expected text without {name}; remove it"


def _all_texts(place: str, value: Any, faults: Faults) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str) and (found := _FORBIDDEN.search(item)) is not None:
            faults.add(place, _forbidden(found.group()))
            return
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
