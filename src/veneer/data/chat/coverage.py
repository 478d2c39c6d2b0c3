"""Parts of a row that the chat template leaves out: tools, tool calls, names and the text of messages.

The row is rendered a second time with a probe, a unique word, added to each part. A part whose probe is not in the text is
left out. The second rendering is made once for each combination of roles and keys; rows with the same combination are
compared with the rendered text instead, and probed only if a part is not found there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from veneer.data.chat.template import Conversation, TemplateError
from veneer.data.rows.messages import Message

__all__ = ["Coverage"]

_PROBE = "veneerprobe{}end"


class Coverage:
    """Finds the parts of conversations that one template leaves out."""

    def __init__(self) -> None:
        self._complete: set[tuple[object, ...]] = set()

    def left_out(self, conversation: Conversation, text: str) -> dict[str, int]:
        """Find the parts of a conversation that are in none of its texts.

        Args:
            conversation: the conversation.
            text: the texts that it is trained in, concatenated.

        Returns:
            The kinds of parts ("content", "names", "tool_calls", "tools"), each with the index of the first message concerned
            (0 for tools). Reasoning is compared per turn, see ``check.py``: templates drop it from earlier turns on purpose.
        """
        structure = _structure(conversation.messages, conversation.tools)
        if structure in self._complete and not _missing(text, conversation.messages, conversation.tools):
            return {}
        messages, tools, probes = _probed(conversation.messages, conversation.tools)
        try:
            probed = conversation.template.render(messages, tools).casefold()
            if any(probe not in probed for probe, _, _ in probes):  # templates may render a part in prompts only
                prompts = [i for i, message in enumerate(messages) if message.get("role") == "assistant" and i]
                probed += "".join(
                    conversation.template.render(messages[:i], tools, prompt=True).casefold() for i in prompts
                )
        except TemplateError:  # the template accepts certain values only, such as names from a list
            return _missing(text, conversation.messages, conversation.tools)
        found: dict[str, int] = {}
        for probe, kind, message in probes:
            if probe not in probed:
                found.setdefault(kind, message)
        if not found:
            self._complete.add(structure)
        return found


def _structure(messages: Sequence[Message], tools: Any) -> tuple[object, ...]:
    return (bool(tools), *((m.get("role"), *sorted(key for key, value in m.items() if value)) for m in messages))


def _probed(messages: Sequence[Message], tools: Any) -> tuple[list[Message], Any, list[tuple[str, str, int]]]:
    """Copies of messages and tools with a probe in each part, and the probes with kind and message index."""
    numbers, probes = count(), []

    def probe(kind: str, index: int) -> str:
        text = _PROBE.format(next(numbers))
        probes.append((text, kind, index))
        return text

    changed: list[Message] = []
    for i, message in enumerate(messages):
        copy = dict(message)
        for kind, key in _texts(message):
            # Templates cut thinking off the beginning of answers on purpose, and off nothing else.
            start = probe(kind, i) if message.get("role") in ("system", "user") and kind == "content" else ""
            copy[key] = f"{start}{message[key]}{probe(kind, i)}"
        if message.get("tool_calls"):
            copy["tool_calls"] = [
                _probed_call(call, probe("tool_calls", i), probe("tool_calls", i)) for call in message["tool_calls"]
            ]
        changed.append(copy)
    if not tools:
        return changed, tools, probes
    return changed, [_probed_tool(tool, lambda: probe("tools", 0)) for tool in tools], probes


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    """(kind, key) of each text of a message."""
    for key, value in message.items():
        if not isinstance(value, str) or not value.strip():
            continue
        if key == "content":
            yield "content", key
        elif key == "name" and message.get("role") != "assistant":
            yield "names", key


def _probed_call(call: Message, name: str, argument: str) -> Message:
    function = call["function"]
    arguments = {**function["arguments"], argument: argument}
    return {**call, "function": {**function, "name": f"{function['name']}{name}", "arguments": arguments}}


def _probed_tool(tool: Message, probe: Any) -> Message:
    function = dict(tool.get("function", tool))
    for key in ("name", "description"):
        if isinstance(function.get(key), str) and function[key]:
            function[key] = f"{function[key]} {probe()}" if key == "description" else f"{function[key]}{probe()}"
    parameters = function.get("parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
        added = {probe(): {"type": "string", "description": "text"}}
        function["parameters"] = {**parameters, "properties": {**parameters["properties"], **added}}
    return {**tool, "function": function} if "function" in tool else function


def _missing(text: str, messages: Sequence[Message], tools: Any) -> dict[str, int]:
    """The kinds of parts that do not occur in the text, without white space and as plain text or JSON."""
    bare = _bare(text)
    found: dict[str, int] = {}
    parts = [(kind, i, message[key]) for i, message in enumerate(messages) for kind, key in _texts(message)]
    for i, message in enumerate(messages):
        for call in message.get("tool_calls") or ():
            parts += [
                ("tool_calls", i, leaf) for leaf in _leaves([call["function"]["name"], call["function"]["arguments"]])
            ]
    for tool in tools or ():
        function = tool.get("function", tool)
        parts += [("tools", 0, leaf) for leaf in _leaves([function.get("name"), function.get("description")])]
    for kind, i, part in parts:
        answer = kind == "content" and messages[i].get("role") == "assistant"
        if not any(_bare(form) in bare for form in _forms(part, answer=answer)):
            found.setdefault(kind, i)
    return found


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def _forms(part: str, *, answer: bool) -> Iterator[str]:
    """A text as it is, an answer without its closed thinking block, and as JSON."""
    yield part
    if answer:
        yield part.replace("<think>", "").rpartition("</think>")[2]
    for ascii_only in (False, True):
        yield json.dumps(part, ensure_ascii=ascii_only)[1:-1]


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
