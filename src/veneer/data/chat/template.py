"""Chat templates: render a conversation as text and keep control strings of the row apart from those of the template.

If the row contains a control string, the string is enclosed in two marks before rendering. Removing the marks from the
result gives the positions of the row's control strings. The marks are noncharacters right beside the string, so trimming,
splitting and searching inside a template work as without them; a comparison with the plain rendering verifies that.

Templates are foreign code and run in transformers' sandbox. Whatever one raises becomes a ``TemplateError``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer._files import decode
from veneer.data.chat.named_templates import NAMED_TEMPLATES
from veneer.data.encode import Encoder, GuardedText
from veneer.data.rows.messages import THINKING_KEYS, Message
from veneer.errors import DataError

__all__ = ["Conversation", "Template", "TemplateError", "read_template", "reserved_error", "template_source"]

_OPEN, _CLOSE = "\ufdd4", "\ufdd5"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_LIMIT = 1 << 20
_GENERATED_KEYS = ("content", *THINKING_KEYS)  # keys of an assistant message that may hold soft control tokens


class TemplateError(DataError):
    """The template cannot render a conversation, or not with exact masks. The message gives the reason without the source.

    ``key`` is the column at error if it is not the conversation's.
    """

    key = ""


def template_source(tokenizer: Any, tools: Any = None, template: str | None = None) -> str | None:
    """Return the Jinja text of a tokenizer's chat template, None if it has none.

    Raises:
        DataError: the tokenizer has several templates, and none of them is the default.
    """
    if template is None and not getattr(tokenizer, "chat_template", None):
        return None
    own = tokenizer.chat_template
    if template is None and isinstance(own, dict) and "default" not in own and not (tools and "tool_use" in own):
        raise DataError(
            f"the tokenizer has several chat templates ({', '.join(sorted(own))}) and no default; choose one with --chat-template NAME"
        )
    return str(tokenizer.get_chat_template(template, tools))


def read_template(choice: str | Path, tokenizer: Any = None) -> str:
    """Read the Jinja text of a chat template.

    Args:
        choice: a file, the name of one of the tokenizer's templates, or a name of ``NAMED_TEMPLATES``.
        tokenizer: the tokenizer whose templates may be named.

    Raises:
        DataError: there is no such file or name, or the file is too large or not UTF-8.
    """
    path, own = Path(choice), getattr(tokenizer, "chat_template", None)
    named = {**NAMED_TEMPLATES, **(own if isinstance(own, dict) else {})}
    if not path.is_file() and str(choice) in named:
        return str(named[str(choice)])
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, nor a chat template of that name; the names are {', '.join(sorted(named))}"
        )
    if path.stat().st_size > _TEMPLATE_LIMIT:
        raise DataError(f"{path}: a chat template is limited to {_TEMPLATE_LIMIT >> 10} KiB")
    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def reserved_error(found: str) -> TemplateError:
    """The error for a row that contains a code point reserved by ``encode.py``."""
    return TemplateError(f"the text holds the code point U+{ord(found):04X}, a Unicode noncharacter; remove it")


class Template:
    """A tokenizer's chat template with its options.

    Attributes:
        source: the Jinja text.
        marks: True if the template marks generated text itself (``{% generation %}``).
    """

    def __init__(self, tokenizer: Any, source: str, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.options = dict(options or {})
        self.marks = _GENERATION.search(source) is not None

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """Render a conversation as text; with ``prompt`` it ends with the generation prompt.

        Raises:
            TemplateError: the template refuses the conversation.
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
            raise TemplateError(f"the chat template refuses the conversation: {_reason(error)}") from error
        return str(text)

    def generated(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation; returns the text and the spans that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        kept = [{k: v for k, v in message.items() if v is not None} for message in messages]
        variables = {**self.tokenizer.special_tokens_map, **self.options}
        try:
            rendered: Any = render_jinja_template(
                [kept], tools=tools, chat_template=self.source, return_assistant_tokens_mask=True, **variables
            )
        except Exception as error:  # foreign code may raise anything
            raise TemplateError(f"the chat template refuses the conversation: {_reason(error)}") from error
        texts, spans = rendered
        return str(texts[0]), [(int(a), int(b)) for a, b in spans[0]]


class Conversation:
    """A conversation to be rendered by a template, with the control strings that its row contains marked.

    Attributes:
        typed: number of control strings in the row.

    Raises:
        TemplateError: the conversation contains a reserved code point, or a control string in a key.
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

    def text(self, upto: int | None = None, *, prompt: bool = False) -> GuardedText:
        """Render the first ``upto`` messages (all if None), with the positions of the row's control strings."""
        plain = self.template.render(self.messages[:upto], self.tools, prompt=prompt)
        if not self.typed:
            return GuardedText(plain)
        return _unmarked(self.template.render(self._marked[:upto], self._marked_tools, prompt=prompt), plain)

    def generated(self, upto: int) -> list[tuple[int, int]]:
        """The spans of the first ``upto`` messages that the template marks as generated."""
        return self.template.generated(self.messages[:upto], self.tools)[1]

    def _mark_tools(self, tools: Any) -> Any:
        try:
            return self._mark(tools, self._encoder.control_pattern)
        except TemplateError as error:
            error.key = "tools"
            raise

    def _mark_message(self, message: Message) -> Message:
        every, special = self._encoder.control_pattern, self._encoder.special_pattern
        assistant = message.get("role") == "assistant"
        return {
            key: self._mark(value, special if assistant and key in _GENERATED_KEYS else every)
            for key, value in message.items()
        }

    def _mark(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return self._mark_text(value, pattern)
        if isinstance(value, dict):
            for key in value:
                if isinstance(key, str) and (found := pattern.search(key) or self._encoder.reserved.search(key)):
                    raise TemplateError(f"the key {key!r} contains {found.group()!r}, which only a template may write")
            return {key: self._mark(item, pattern) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark(item, pattern) for item in value]
        return value

    def _mark_text(self, text: str, pattern: re.Pattern[str]) -> str:
        if (found := self._encoder.reserved.search(text)) is not None:
            raise reserved_error(found.group())
        marked, count = pattern.subn(lambda m: f"{_OPEN}{m.group()}{_CLOSE}", text)
        self.typed += count
        return marked


def _unmarked(marked: str, plain: str) -> GuardedText:
    """Remove the marks from a rendering; they must come in pairs and have changed nothing else."""
    pieces = _MARKS.split(marked)
    if "".join(pieces) != plain or not _paired(marked):
        raise TemplateError(
            "the row contains a control string and the chat template treats that text specially, so the two cannot be "
            "told apart; remove the control string from the row"
        )
    guards = []
    at = 0
    for k, piece in enumerate(pieces):
        if k % 2:
            guards.append((at, at + len(piece)))
        at += len(piece)
    return GuardedText(plain, tuple(guards))


def _paired(marked: str) -> bool:
    """Check that marks open and close in turn, so that none was lost or moved."""
    marks = "".join(_MARKS.findall(marked))
    return marks == (_OPEN + _CLOSE) * (len(marks) // 2)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
