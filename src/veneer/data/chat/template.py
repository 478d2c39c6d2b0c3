"""Chat templates: one conversation to one text, with what users typed kept apart from what the template wrote.

A row in which nobody typed a control string is rendered as it is. In the others each typed control string is put
between two marks before rendering; the marks are taken out of the result and leave the places where typed control
strings stand. Since the marks are tight around the control string and neither white space nor ordinary text, trimming,
splitting and searching inside a template work as without them; that they did is checked against the plain rendering.

Boundary: templates are foreign code, run in transformers' sandbox; whatever one raises becomes a ``TemplateFault`` with
its own words. Ids and masks are not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.data.encode import Encoder, Guarded
from veneer.errors import DataError

__all__ = ["Conversation", "Template", "TemplateFault", "read_template", "reserved_fault", "template_source"]

Message = dict[str, Any]

_OPEN, _CLOSE = "\ufdd4", "\ufdd5"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_CAP = 1 << 20
_SPOKEN = ("content", "reasoning_content", "thinking", "reasoning")  # where an assistant's turn may hold soft controls


class TemplateFault(DataError):
    """A conversation that the template cannot render, or not so that masks are exact; says why, without the place.

    ``key`` is the column to blame where it is another than the conversation's.
    """

    key = ""


def template_source(tokenizer: Any, tools: Any = None, template: str | None = None) -> str | None:
    """The Jinja text that ``tokenizer`` would use, or None where it has none."""
    if template is None and not getattr(tokenizer, "chat_template", None):
        return None
    return str(tokenizer.get_chat_template(template, tools))


def read_template(path: Path) -> str:
    """The Jinja text in a file. Raises DataError for one that is missing, too large or no text."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file to take a chat template from")
    if path.stat().st_size > _TEMPLATE_CAP:
        raise DataError(f"{path}: a chat template has at most {_TEMPLATE_CAP >> 10} KiB")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def reserved_fault(found: str) -> TemplateFault:
    """What to say of a row that holds a code point to which ``encode.py`` gives a meaning."""
    return TemplateFault(
        f"the text holds the code point U+{ord(found):04X}, which Unicode reserves for programs' own use; remove it"
    )


class Template:
    """A tokenizer's chat template with its options.

    Attributes:
        source: the Jinja text.
        marks: whether the template says itself what the assistant generates (``{% generation %}``).
    """

    def __init__(self, tokenizer: Any, source: str, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.options = dict(options or {})
        self.marks = _GENERATION.search(source) is not None

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """The text of a conversation; with ``prompt`` it ends with the opening of the assistant's next turn.

        Raises:
            TemplateFault: the template refuses the conversation.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.options,
            )
        except Exception as error:  # foreign code may raise anything
            raise TemplateFault(f"the chat template refuses the conversation: {_words(error)}") from error
        return str(text)

    def generated(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the stretches of it that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        kept = [{k: v for k, v in message.items() if v is not None} for message in messages]
        variables = {**self.tokenizer.special_tokens_map, **self.options}
        try:
            rendered: Any = render_jinja_template(
                [kept], tools=tools, chat_template=self.source, return_assistant_tokens_mask=True, **variables
            )
        except Exception as error:  # foreign code may raise anything
            raise TemplateFault(f"the chat template refuses the conversation: {_words(error)}") from error
        texts, stretches = rendered
        return str(texts[0]), [(int(a), int(b)) for a, b in stretches[0]]


class Conversation:
    """One conversation on its way through a template, with its typed control strings known.

    Raises:
        TemplateFault: the conversation holds a reserved code point, or a control string as a key.
    """

    def __init__(self, template: Template, encoder: Encoder, messages: Sequence[Message], tools: Any = None) -> None:
        self.template = template
        self.messages = list(messages)
        self.tools = tools
        self.typed = 0
        self._encoder = encoder
        marked = [self._mark_message(message) for message in self.messages]
        marked_tools = self._mark_tools(tools)
        if self.typed:
            self._marked: list[Message] = marked
            self._marked_tools = marked_tools

    def text(self, upto: int | None = None, *, prompt: bool = False) -> Guarded:
        """The text of the first ``upto`` messages (all if None), and where typed control strings stand in it."""
        plain = self.template.render(self.messages[:upto], self.tools, prompt=prompt)
        if not self.typed:
            return Guarded(plain)
        return _unmarked(self.template.render(self._marked[:upto], self._marked_tools, prompt=prompt), plain)

    def generated(self, upto: int) -> list[tuple[int, int]]:
        """Where the template marks text of the first ``upto`` messages as generated."""
        return self.template.generated(self.messages[:upto], self.tools)[1]

    def _mark_tools(self, tools: Any) -> Any:
        try:
            return self._mark(tools, self._encoder.control_pattern)
        except TemplateFault as fault:
            fault.key = "tools"
            raise

    def _mark_message(self, message: Message) -> Message:
        every, special = self._encoder.control_pattern, self._encoder.special_pattern
        spoken = message.get("role") == "assistant"
        return {
            key: self._mark(value, special if spoken and key in _SPOKEN else every) for key, value in message.items()
        }

    def _mark(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return self._mark_text(value, pattern)
        if isinstance(value, dict):
            for key in value:
                if isinstance(key, str) and (found := pattern.search(key) or self._encoder.reserved.search(key)):
                    raise TemplateFault(f"the key {key!r} holds {found.group()!r}, which only a template may write")
            return {key: self._mark(item, pattern) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark(item, pattern) for item in value]
        return value

    def _mark_text(self, text: str, pattern: re.Pattern[str]) -> str:
        if (found := self._encoder.reserved.search(text)) is not None:
            raise reserved_fault(found.group())
        marked, count = pattern.subn(lambda m: f"{_OPEN}{m.group()}{_CLOSE}", text)
        self.typed += count
        return marked


def _unmarked(marked: str, plain: str) -> Guarded:
    """Take the marks out of a rendering; they must be whole pairs and have changed nothing else."""
    pieces = _MARKS.split(marked)
    if "".join(pieces) != plain or not _paired(marked):
        raise TemplateFault(
            "a control string is typed in the row and the chat template treats that text in a special way, so the "
            "typed one cannot be told from the template's own; remove it from the row"
        )
    guards = []
    at = 0
    for k, piece in enumerate(pieces):
        if k % 2:
            guards.append((at, at + len(piece)))
        at += len(piece)
    return Guarded(plain, tuple(guards))


def _paired(marked: str) -> bool:
    """Whether marks open and close in turn, so that none was lost or moved."""
    marks = "".join(_MARKS.findall(marked))
    return marks == (_OPEN + _CLOSE) * (len(marks) // 2)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
