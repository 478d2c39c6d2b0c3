"""Conversion of a row's columns to a ``Row``, one function per shape; all errors of the row are collected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from veneer.data.rows.json_rows import describe, parse_json
from veneer.data.rows.messages import MESSAGE_ROLES, Message, RowErrors, checked_messages, checked_text, checked_tools
from veneer.data.rows.row import Row

__all__ = ["CONVERTERS", "TAGS", "ColumnValues", "with_system"]

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
"""Roles of the tags in ShareGPT rows; a function_call is an assistant's turn that calls a tool."""


class ColumnValues:
    """The columns of one row under our names, with the errors found in them."""

    def __init__(self, columns: Mapping[str, Any], errors: RowErrors, tags: Mapping[str, str]) -> None:
        self.columns = columns
        self.errors = errors
        self.tags = tags

    def get(self, key: str) -> Any:
        """A column; None if it is missing, null or empty."""
        value = self.columns.get(key)
        return None if value == "" else value

    def parsed(self, key: str) -> Any:
        """A column that may hold its list as JSON text, as in a CSV file; None if it is missing, null or empty."""
        value = self.get(key)
        if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
            try:
                return parse_json(value)
            except ValueError as error:
                self.errors.add(key, f"not valid JSON: {error}")
                return None
        return value

    def text(self, key: str, *, empty: bool = False) -> str | None:
        """A column that must hold text; None, with an error added, if it does not."""
        return checked_text(key, self.columns.get(key), self.errors, empty=empty)

    def optional_text(self, key: str, *, empty: bool = False) -> str | None:
        """A column that holds text or nothing."""
        return None if self.get(key) is None else self.text(key, empty=empty)

    def tools(self) -> list[dict[str, Any]] | None:
        """The checked tools of the row."""
        return checked_tools("tools", self.parsed("tools"), self.errors)


def _messages(source: str, values: ColumnValues) -> Row | None:
    listed = values.parsed("messages")
    if values.errors:
        return None
    messages, weights = checked_messages("messages", listed, values.errors)
    return _chat(source, values, "messages", *with_system(messages, weights, values))


def with_system(
    messages: list[Message], weights: list[float], values: ColumnValues
) -> tuple[list[Message], list[float]]:
    """The messages and their weights, behind the system message that a column of its own may hold."""
    system = values.optional_text("system")
    if system is None or not messages:
        return messages, weights
    if messages[0].get("role") != "system":
        return [{"role": "system", "content": system}, *messages], [0.0, *weights]
    if messages[0].get("content") != system:
        values.errors.add("system", "the messages begin with another system message; keep one of the two")
    return messages, weights


def _chat(source: str, values: ColumnValues, key: str, messages: list[Message], weights: list[float]) -> Row | None:
    tools = values.tools()
    if values.errors:
        return None
    return Row("chat", source, tuple(messages), tuple(weights), tools, key=values.errors.name(key))


def _prompt(source: str, values: ColumnValues) -> Row | None:
    prompt, completion = (values.columns.get(key) for key in ("prompt", "completion"))  # text like JSON stays text
    if isinstance(prompt, list) or isinstance(completion, list):
        return _prompt_messages(source, values, prompt, completion)
    prompt, completion = values.text("prompt"), values.text("completion")
    system = values.optional_text("system")
    if prompt is None or completion is None or values.errors:
        return None
    messages: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
        prompt = f"{system}\n\n{prompt}"
    weights = (1.0,) * len(messages)
    key = values.errors.name("completion")
    return Row("pair", source, tuple(messages), weights, prompt=prompt, completion=completion, key=key)


def _prompt_messages(source: str, values: ColumnValues, prompt: Any, completion: Any) -> Row | None:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    before, _ = checked_messages("prompt", prompt, values.errors)
    after, weights = checked_messages("completion", completion, values.errors)
    messages, weights = with_system(before + after, [0.0] * len(before) + weights, values)
    return _chat(source, values, "completion", messages, weights)


def _alpaca(source: str, values: ColumnValues) -> Row | None:
    instruction, output = values.text("instruction"), values.text("output")
    extra = values.optional_text("input", empty=True)
    system = values.optional_text("system")
    history = _history(values)
    if values.errors or output is None:
        return None
    prompt = "\n\n".join(part for part in (instruction, extra) if part and part.strip())
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in [*history, (prompt, output)]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    plain = [system or "", *(text for pair in history for text in pair), prompt]
    return Row(
        "pair",
        source,
        tuple(messages),
        (1.0,) * len(messages),
        prompt="\n\n".join(text for text in plain if text) + "\n\n",
        completion=output,
        key=values.errors.name("output"),
    )


def _history(values: ColumnValues) -> list[tuple[str, str]]:
    history = values.parsed("history")
    if history is None or values.errors:
        return []
    if not isinstance(history, list):
        values.errors.add("history", f"expected a list of [question, answer], found {describe(history)}")
        return []
    pairs = []
    for k, item in enumerate(history):
        if not isinstance(item, list) or len(item) != 2:
            values.errors.add(f"history[{k}]", f"expected [question, answer], found {describe(item)}")
            continue
        question, answer = (checked_text(f"history[{k}][{i}]", item[i], values.errors) for i in (0, 1))
        pairs.append((question or "", answer or ""))
    return pairs


def _sharegpt(source: str, values: ColumnValues) -> Row | None:
    turns = values.parsed("conversations")
    if values.errors:
        return None
    if not isinstance(turns, list) or not turns:
        found = describe(turns)
        values.errors.add("conversations", f"expected a list of turns with from and value, found {found}")
        return None
    plain = [_from_tag(f"conversations[{k}]", turn, values) for k, turn in enumerate(turns)]
    system = values.optional_text("system")
    if values.errors:
        return None
    if system is not None:
        plain.insert(0, {"role": "system", "content": system})
    messages, weights = checked_messages("conversations", plain, values.errors, shift=int(system is not None))
    return _chat(source, values, "conversations", messages, weights)


def _from_tag(path: str, turn: Any, values: ColumnValues) -> Message:
    if not isinstance(turn, dict):
        values.errors.add(path, f"expected an object with from and value, found {describe(turn)}")
        return {}
    if "role" in turn and "content" in turn and "from" not in turn:
        return turn
    for key in ("from", "value"):
        if key not in turn:
            values.errors.add(f"{path}.{key}", f"missing; the turn has {', '.join(map(str, turn)) or 'no key'}")
            return {}
    tag = turn["from"]
    role = values.tags.get(tag) if isinstance(tag, str) else None
    if role is None:
        known = ", ".join(values.tags)
        values.errors.add(
            f"{path}.from", f"expected one of {known}, found {describe(tag)}; map other tags to roles with --roles"
        )
        return {}
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if role != "function_call":
        return {"role": role, "content": turn["value"], **rest}
    return {"role": "assistant", "content": "", "tool_calls": _calls(path, turn["value"], values), **rest}


def _calls(path: str, value: Any, values: ColumnValues) -> list[Message]:
    try:
        call = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        values.errors.add(f"{path}.value", f"expected a call as JSON, with name and arguments: {error}")
        return []
    calls = call if isinstance(call, list) else [call]
    for item in calls:
        if not isinstance(item, dict) or "name" not in item:
            values.errors.add(f"{path}.value", f"expected a call with name and arguments, found {describe(item)}")
            return []
    return [{"type": "function", "function": item} for item in calls]


def _text(source: str, values: ColumnValues) -> Row | None:
    text = values.text("text")
    return None if text is None else Row("text", source, text=text, key=values.errors.name("text"))


def _labelled(source: str, values: ColumnValues) -> Row | None:
    text, label = values.columns.get("text"), values.columns.get("label")
    second = values.optional_text("text_pair")
    words: tuple[str, ...] = ()
    if isinstance(label, list) or (isinstance(text, list) and (second is not None or len(text) != 2)):
        words = _words(text, values)
        text = " ".join(words)
    elif isinstance(text, list):
        pair = [checked_text(f"text[{at}]", part, values.errors) for at, part in enumerate(text)]
        text, second = pair[0] or "", pair[1]
    else:
        text = values.text("text")
    if values.errors or text is None:
        return None
    return Row(
        "labelled",
        source,
        text=text,
        second=second or "",
        words=words,
        label=label,
        key="",
    )


def _words(text: Any, values: ColumnValues) -> tuple[str, ...]:
    if isinstance(text, str):
        return tuple(text.split())
    if not isinstance(text, list) or not text:
        values.errors.add("text", f"expected text, two texts or a list of words, found {describe(text)}")
        return ()
    return tuple(checked_text(f"text[{at}]", word, values.errors) or "" for at, word in enumerate(text))


CONVERTERS: dict[str, Callable[[str, ColumnValues], Row | None]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt": _prompt,
    "alpaca": _alpaca,
    "text": _text,
    "labelled": _labelled,
}
assert set(TAGS.values()) <= {*MESSAGE_ROLES, "function_call"}
