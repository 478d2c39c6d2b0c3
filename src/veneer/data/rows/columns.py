"""From the columns of one row to a ``Row``, one function a shape; everything that is wrong is noted, each with its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from veneer.data.chat.messages import MESSAGE_ROLES, Faults, checked_messages, checked_text, checked_tools
from veneer.data.rows.json_rows import kind, parse_json
from veneer.data.rows.row import Row

__all__ = ["CONVERTERS", "TAGS", "Faults", "Values"]

TAGS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
"""Tags of sharegpt rows and what they mean; a function_call is an assistant's turn that calls a tool."""

Message = dict[str, Any]


class Values:
    """The columns of one row under our names, with the faults found in them."""

    def __init__(self, columns: Mapping[str, Any], faults: Faults, tags: Mapping[str, str]) -> None:
        self.columns = columns
        self.faults = faults
        self.tags = tags

    def get(self, key: str) -> Any:
        """A column, None where it is missing, null or an empty text."""
        value = self.columns.get(key)
        return None if value == "" else value

    def unpacked(self, key: str) -> Any:
        """A column that may hold its list as JSON text, as in a CSV file."""
        value = self.columns.get(key)
        if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
            try:
                return parse_json(value)
            except ValueError as error:
                self.faults.add(key, f"not valid JSON: {error}")
                return None
        return value


def _messages(source: str, values: Values) -> Row | None:
    listed = values.unpacked("messages")
    if values.faults:
        return None
    found = checked_messages("messages", listed, values.faults)
    tools = checked_tools("tools", _tools(values), values.faults)
    if values.faults:
        return None
    return Row("chat", source, tuple(found.messages), tuple(found.weights), tools, key=values.faults.name("messages"))


def _prompt(source: str, values: Values) -> Row | None:
    asked, answered = (
        values.columns.get("prompt"),
        values.columns.get("completion"),
    )  # text that looks like JSON is text
    if isinstance(asked, list) or isinstance(answered, list):
        return _prompt_messages(source, values, asked, answered)
    prompt = checked_text("prompt", asked, values.faults)
    completion = checked_text("completion", answered, values.faults)
    if prompt is None or completion is None or values.faults:
        return None
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    key = values.faults.name("completion")
    return Row("pair", source, messages, (1.0, 1.0), prompt=prompt, completion=completion, key=key)


def _prompt_messages(source: str, values: Values, asked: Any, answered: Any) -> Row | None:
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if isinstance(answered, str):
        answered = [{"role": "assistant", "content": answered}]
    before = checked_messages("prompt", asked, values.faults)
    behind = checked_messages("completion", answered, values.faults)
    tools = checked_tools("tools", _tools(values), values.faults)
    if values.faults:
        return None
    weights = (0.0,) * len(before.messages) + tuple(behind.weights)
    key = values.faults.name("completion")
    return Row("chat", source, (*before.messages, *behind.messages), weights, tools, key=key)


def _alpaca(source: str, values: Values) -> Row | None:
    faults = values.faults
    asked = checked_text("instruction", values.columns.get("instruction"), faults)
    answered = checked_text("output", values.columns.get("output"), faults)
    parts = [asked or ""]
    if values.get("input") is not None:
        parts.append(checked_text("input", values.get("input"), faults, empty=True) or "")
    system = checked_text("system", values.get("system"), faults) if values.get("system") is not None else None
    history = _history(values)
    if faults or answered is None:
        return None
    prompt = "\n\n".join(part for part in parts if part.strip())
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for earlier, reply in history:
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": reply}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answered}]
    plain = [system or "", *(text for pair in history for text in pair), prompt]
    return Row(
        "pair",
        source,
        tuple(messages),
        (1.0,) * len(messages),
        prompt="\n\n".join(text for text in plain if text) + "\n\n",
        completion=answered,
        key=faults.name("output"),
    )


def _history(values: Values) -> list[tuple[str, str]]:
    history = values.unpacked("history")
    if history is None or history == "" or values.faults:
        return []
    if not isinstance(history, list):
        values.faults.add("history", f"expected a list of [asked, answered], found {kind(history)}")
        return []
    pairs = []
    for k, item in enumerate(history):
        if not isinstance(item, list) or len(item) != 2:
            values.faults.add(f"history[{k}]", f"expected [asked, answered], found {kind(item)}")
            continue
        asked, answered = (checked_text(f"history[{k}][{side}]", item[side], values.faults) for side in (0, 1))
        pairs.append((asked or "", answered or ""))
    return pairs


def _sharegpt(source: str, values: Values) -> Row | None:
    faults = values.faults
    turns = values.unpacked("conversations")
    if faults:
        return None
    if not isinstance(turns, list) or not turns:
        faults.add("conversations", f"expected a list of turns with from and value, found {kind(turns)}")
        return None
    plain = [_from_tag(f"conversations[{k}]", turn, values) for k, turn in enumerate(turns)]
    above = values.get("system") is not None
    if above:
        plain.insert(0, {"role": "system", "content": checked_text("system", values.get("system"), faults)})
    tools = checked_tools("tools", _tools(values), faults)
    if faults:
        return None
    found = checked_messages("conversations", plain, faults, shift=int(above))
    if faults:
        return None
    return Row("chat", source, tuple(found.messages), tuple(found.weights), tools, key=faults.name("conversations"))


def _from_tag(place: str, turn: Any, values: Values) -> Message:
    if not isinstance(turn, dict):
        values.faults.add(place, f"expected an object with from and value, found {kind(turn)}")
        return {}
    if "role" in turn and "content" in turn and "from" not in turn:
        return turn
    for key in ("from", "value"):
        if key not in turn:
            values.faults.add(f"{place}.{key}", f"missing; the turn has {', '.join(map(str, turn)) or 'no key'}")
            return {}
    tag = turn["from"]
    role = values.tags.get(tag) if isinstance(tag, str) else None
    if role is None:
        known = ", ".join(values.tags)
        values.faults.add(
            f"{place}.from", f"expected one of {known}, found {kind(tag)}; other tags can be mapped to roles"
        )
        return {}
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if role != "function_call":
        return {"role": role, "content": turn["value"], **rest}
    return {"role": "assistant", "content": "", "tool_calls": _calls(place, turn["value"], values), **rest}


def _calls(place: str, value: Any, values: Values) -> list[Message]:
    try:
        call = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        values.faults.add(f"{place}.value", f"expected a call as JSON, with name and arguments: {error}")
        return []
    calls = call if isinstance(call, list) else [call]
    for item in calls:
        if not isinstance(item, dict) or "name" not in item:
            values.faults.add(f"{place}.value", f"expected a call with name and arguments, found {kind(item)}")
            return []
    return [{"type": "function", "function": item} for item in calls]


def _text(source: str, values: Values) -> Row | None:
    text = checked_text("text", values.columns.get("text"), values.faults)
    return None if text is None else Row("text", source, text=text, key=values.faults.name("text"))


def _tools(values: Values) -> Any:
    tools = values.unpacked("tools")
    return None if tools == "" else tools


CONVERTERS: dict[str, Callable[[str, Values], Row | None]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt": _prompt,
    "alpaca": _alpaca,
    "text": _text,
}
assert set(TAGS.values()) <= {*MESSAGE_ROLES, "function_call"}
