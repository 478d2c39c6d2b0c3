"""What goes into rendering a row, its options, and what comes out, tokens with their weights and characters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.data.example import Example
from veneer.errors import ConfigError

__all__ = ["PromptStyle", "RenderOptions", "Rendered", "TrainOn"]

TrainOn = Literal["assistant", "last", "all"]
PromptStyle = Literal["auto", "chat", "plain"]


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """How rows become tokens.

    Attributes:
        train_on: "assistant" (all its turns), "last" (its last turn) or "all" (every token).
        max_length: tokens of an example, at most; what is behind is cut off and counted. None: no bound.
        chat_template: a Jinja text (or the name of one of the tokenizer's) instead of the tokenizer's own.
        template_options: variables for the template, such as ``{"enable_thinking": False}``.
        prompt_style: whether prompt and completion go through the chat template; "auto": if there is one.
        parse_specials: whether control strings in plain rows (``text``, plain pairs) are control tokens, as in rows
            that were rendered by a template before. Never applies to conversations.
    """

    train_on: TrainOn = "assistant"
    max_length: int | None = None
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    prompt_style: PromptStyle = "auto"
    parse_specials: bool = False

    def __post_init__(self) -> None:
        if self.train_on not in ("assistant", "last", "all"):
            raise ConfigError(f"train_on: expected assistant, last or all, found {self.train_on!r}.")
        if self.prompt_style not in ("auto", "chat", "plain"):
            raise ConfigError(f"prompt_style: expected auto, chat or plain, found {self.prompt_style!r}.")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length: expected at least 2 tokens, found {self.max_length}.")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row (or a part of one) as tokens.

    Attributes:
        source: "file:line".
        text: the rendered text.
        ids, weights: as in ``Example``, after truncation.
        starts, ends: the characters of ``text`` that each token covers.
        turns: the assistant's trained turns: message index, first character, character behind the end token.
        notes: what is remarkable, as keys of ``notes.NOTES``.
        length: tokens before truncation.
        lost: trained tokens that truncation took.
        typed: control strings that stand in the row's own text and stay text.
    """

    source: str
    text: str
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    turns: tuple[tuple[int, int, int], ...]
    notes: tuple[str, ...]
    length: int
    lost: int
    typed: tuple[str, ...] = ()

    @property
    def trained(self) -> int:
        """How many tokens the loss counts."""
        return len(self.weights) - self.weights.count(0.0)

    @property
    def example(self) -> Example:
        """What training takes of it."""
        return Example(self.ids, self.weights, self.source)
