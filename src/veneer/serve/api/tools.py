"""Tool calls and reasoning in the text of a model, and grammars that force a call.

transformers' response parser splits the text by a description that some tokenizers have (``response_template``). For templates that
write calls as JSON in ``<tool_call>`` tags (Hermes, Qwen 2.5 and 3, SmolLM 3), the description is here.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.serve.api.errors import invalid
from veneer.serve.api.parameters import NamedTool, Tool
from veneer.serve.engine.request import Grammar

_log = logging.getLogger(__name__)
_TAGGED_JSON: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


@dataclass
class MessagePieces:
    """The addition of a piece of text to a message."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class MessageParser:
    """Splits the text of an answer, as it comes, into content, reasoning and tool calls."""

    def __init__(self, description: dict[str, Any] | None, prompt: str, tools: Sequence[dict[str, Any]]) -> None:
        """Without a description, all text is content."""
        self.calls = 0
        self._parser: Any = None
        if description is not None:
            from transformers.utils.chat_parsing import ResponseParser

            self._parser = ResponseParser(description, prefix=prompt, tools=list(tools))
        self._raw = self._sent = ""
        """The text since the last call, and what of it has been handed on as content."""

    def feed(self, text: str) -> MessagePieces:
        """The pieces that are complete with this text."""
        if self._parser is None:
            return MessagePieces(content=text)
        self._raw += text
        return self._guarded(lambda: self._parser.feed(text))

    def end(self) -> MessagePieces:
        """The pieces that were held back until the end."""
        if self._parser is None:
            return MessagePieces()
        return self._guarded(lambda: self._parser.finalize()[1])

    def _guarded(self, work: Any) -> MessagePieces:
        """Parse the text; text that the parser refuses, such as broken JSON in a call, is content."""
        pieces = MessagePieces()
        try:
            events = work()
        except Exception as error:
            _log.warning("a tool call could not be parsed: %s", type(error).__name__)
            pieces.content, self._parser = self._raw.removeprefix(self._sent), None
            return pieces
        for event in events:
            kind, name = event["type"], event.get("field")
            if kind == "region_chunk" and event.get("dirty"):
                continue
            if kind == "region_chunk" and name in ("reasoning_content", "thinking", "reasoning"):
                pieces.reasoning += event.get("text") or ""
            elif kind == "region_chunk" and name == "content":
                pieces.content += event.get("text") or ""
                self._sent += event.get("text") or ""
            elif kind == "region_close" and name == "tool_calls":
                self._raw = self._sent = ""
                pieces.calls.append(self._call(event.get("value")))
        return pieces

    def _call(self, value: Any) -> dict[str, Any]:
        function = value.get("function", value) if isinstance(value, dict) else {}
        arguments = function.get("arguments", function.get("parameters", {}))
        self.calls += 1
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": str(function.get("name", "")),
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
            },
        }


def description_of(tokenizer: Any, template: str) -> dict[str, Any] | None:
    """The description of how answers under a chat template are split, or None if it is not known."""
    own = getattr(tokenizer, "response_template", None)
    if isinstance(own, dict):
        return own
    return _TAGGED_JSON if "<tool_call>" in template and '"arguments"' in template else None


def forced_call(
    choice: str | NamedTool | None, tools: Sequence[Tool], description: dict[str, Any] | None
) -> Grammar | None:
    """The grammar of answers that must call a function, or None if the choice leaves it to the model.

    Raises:
        ApiError: the choice names no tool, or calls cannot be forced under this template.
    """
    if choice in (None, "none", "auto"):
        return None
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise invalid(f"tool_choice: {choice.function.name!r} is not among the tools", "tool_choice")
        names = [choice.function.name]
    if description is not _TAGGED_JSON:
        raise invalid(
            'tool_choice: calls can only be forced for templates that write them as JSON in <tool_call> tags; use "auto"',
            "tool_choice",
        )
    calls = []
    for tool in tools:
        if tool.function.name in names:
            arguments = tool.function.parameters or {"type": "object"}
            properties = {"name": {"const": tool.function.name}, "arguments": arguments}
            calls.append(
                {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
            )
    schema = json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})
    return Grammar("lark", f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {schema}\n')
