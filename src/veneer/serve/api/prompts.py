"""Prompts of requests as token ids.

Text of a client stays text: a control string in a message or a prompt is encoded as ordinary tokens, as in training. To send control
tokens, send token ids; /v1/tokenize gives those of a conversation.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.data.chat.coverage import Coverage
from veneer.data.chat.render import Renderer, frame
from veneer.data.chat.rendered import RenderOptions
from veneer.data.chat.template import Conversation, Template, TemplateError, template_source
from veneer.serve.api.errors import invalid
from veneer.serve.api.parameters import ChatMessage, Tool
from veneer.serve.api.time_limit import within
from veneer.serve.limits import ServeLimits

_MAX_TEMPLATES = 64


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids of a prompt, and its text."""

    ids: tuple[int, ...]
    text: str


class PromptRenderer:
    """Renders prompts with one tokenizer. Its methods take time in proportion to the prompt; call them off the event loop."""

    def __init__(self, tokenizer: Any, limits: ServeLimits) -> None:
        self.tokenizer = tokenizer
        self._limits = limits
        self._base = Renderer(tokenizer)
        self._before, _ = frame(tokenizer, self._base.encoder)
        self._by_template: dict[str, Renderer] = {}
        self._lock = threading.Lock()

    @property
    def chats(self) -> bool:
        """True if the base has a chat template."""
        return self._base.template is not None

    def source(self, template: str | None) -> str:
        """The Jinja text of the chat template that is used; empty if there is none."""
        found = self._renderer(template).template
        return "" if found is None else found.source

    def text(self, text: str, *, begin: bool = True) -> tuple[int, ...]:
        """Token ids of a plain text, after the tokens that the tokenizer puts before a text."""
        encoder = self._base.encoder
        if (found := encoder.reserved.search(text)) is not None:
            raise invalid(
                f"prompt: the text holds U+{ord(found.group()):04X}, a Unicode noncharacter; remove it", "prompt"
            )
        ids = encoder.plain_ids(text) if text else []
        return (*(self._before if begin else ()), *ids)

    def chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] | None = None,
        *,
        template: str | None = None,
        effort: str | None = None,
        prompt: bool = True,
    ) -> RenderedPrompt:
        """Token ids of a conversation.

        Args:
            messages: the messages.
            tools: functions that the model may call.
            template: a chat template in place of the base's, from an adapter's folder.
            effort: reasoning effort, for templates that have it.
            prompt: end with the beginning of an answer.

        Raises:
            ApiError: the template refuses the conversation, leaves a part of it out, or does not end in time.
        """
        seconds = self._limits.render_seconds
        late = invalid(f"messages: the chat template does not end within {seconds:g} seconds", "messages", "timeout")
        return within(
            seconds, late, lambda: self._chat(messages, tools, template=template, effort=effort, prompt=prompt)
        )

    def _chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] | None,
        *,
        template: str | None,
        effort: str | None,
        prompt: bool,
    ) -> RenderedPrompt:
        renderer = self._renderer(template)
        if renderer.template is None:
            raise invalid(
                "messages: this model has no chat template; use /v1/completions", "messages", "no_chat_template"
            )
        given = [tool.model_dump(exclude_none=True) for tool in tools or ()] or None
        source = template_source(self.tokenizer, given, template) or renderer.template.source
        options = {}
        if effort is not None:
            if "reasoning_effort" not in source:
                raise invalid(
                    "reasoning_effort: the chat template of this model has no reasoning effort", "reasoning_effort"
                )
            options["reasoning_effort"] = effort
        plain = [plain_message(message, i, source) for i, message in enumerate(messages)]
        chosen = Template(self.tokenizer, source, options)
        try:
            conversation = Conversation(chosen, renderer.encoder, plain, given)
            text = conversation.text(prompt=prompt)
            left_out = Coverage().left_out(conversation, text.text)
        except TemplateError as error:
            raise invalid(f"messages: {error}", "tools" if error.key == "tools" else "messages") from None
        for kind in ("tools", "tool_calls", "content"):
            if kind in left_out:
                param = "tools" if kind == "tools" else f"messages.{left_out[kind]}.{kind}"
                raise invalid(
                    f"{param}: the chat template of this model leaves it out", param, "unsupported_by_template"
                )
        if len(text.text) > self._limits.max_rendered_characters:
            raise invalid(
                f"messages: more than {self._limits.max_rendered_characters:,} characters with the template", "messages"
            )
        return RenderedPrompt(tuple(renderer.encoder.encode([text])[0].ids), text.text)

    def _renderer(self, template: str | None) -> Renderer:
        if template is None:
            return self._base
        with self._lock:
            if template not in self._by_template:
                if len(self._by_template) >= _MAX_TEMPLATES:
                    self._by_template.pop(next(iter(self._by_template)))
                self._by_template[template] = Renderer(self.tokenizer, RenderOptions(chat_template=template))
            return self._by_template[template]


def plain_message(message: ChatMessage, number: int, template: str) -> dict[str, Any]:
    """A message as templates take it: its content one text, the arguments of tool calls parsed."""
    found = message.model_dump(
        exclude_none=True, exclude={"content", "tool_calls", "refusal", "annotations", "tool_call_id"}
    )
    if message.role == "developer" and "developer" not in template:
        found["role"] = "system"
    content = message.content or ""
    found["content"] = content if isinstance(content, str) else "".join(part.text for part in content)
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "type": "function",
                **({} if call.id is None else {"id": call.id}),
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"messages.{number}.tool_calls.{i}"),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return found


def _arguments(text: str, param: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise invalid(f"{param}.function.arguments: expected a JSON object", f"{param}.function.arguments")
    return found
