"""Options and result of rendering: ``RenderOptions`` and ``Rendered``, a row as tokens with weights and characters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.data.example import Example
from veneer.errors import ConfigError

__all__ = ["NOTES", "PromptStyle", "RenderOptions", "Rendered", "TrainOn"]

TrainOn = Literal["assistant", "last", "all"]
PromptStyle = Literal["auto", "chat", "plain"]

NOTES = {
    "split": "the chat template renders earlier turns in a different form than the model generates them; the conversation "
    "became several examples, each with its turns as generated",
    "opening_differs": "the generation prompt opens the assistant's turn with more than finished turns begin with (such as "
    "<think>); the model is trained without that opening",
    "behind_prompt": "the chat template renders the text before the answer differently in prompts and in finished "
    "conversations; the row is trained as prompted",
    "no_end_token": "no token marks the end of the answer, so the model does not learn to stop",
    "tools_left_out": "the chat template does not render the tools, so the model does not see them; choose another template with "
    "--chat-template, such as chatml-tools",
    "names_left_out": "the chat template does not render the names of messages",
    "unmarked": "the template has generation marks, but none in this turn; the whole turn is trained",
    "boundary_cut": "prompt and answer were tokenized separately, because one token would have covered parts of both",
}
"""The remarks that rendering makes about a row, by the keys of ``Rendered.notes``."""


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """Options for turning rows into tokens.

    Attributes:
        train_on: "assistant" (all its turns), "last" (its last turn) or "all" (every token).
        max_length: maximum tokens of an example; the rest is cut off and counted. None: no limit.
        chat_template: a Jinja text (or the name of one of the tokenizer's) to use instead of the tokenizer's own.
        template_options: variables for the template, such as ``{"enable_thinking": False}``.
        prompt_style: "chat" renders prompt and completion through the chat template, "plain" does not; "auto" does if
            there is a template.
        parse_specials: parse control strings in plain rows (``text``, plain pairs) as control tokens, for rows that were
            rendered by a template before. Never applies to conversations.
        vocab_size: number of rows of the base's embedding; a row with a token beyond it is refused. None: not checked.
    """

    train_on: TrainOn = "assistant"
    max_length: int | None = None
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    prompt_style: PromptStyle = "auto"
    parse_specials: bool = False
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.train_on not in ("assistant", "last", "all"):
            raise ConfigError(f"train_on: expected assistant, last or all, found {self.train_on!r}")
        if self.prompt_style not in ("auto", "chat", "plain"):
            raise ConfigError(f"prompt_style: expected auto, chat or plain, found {self.prompt_style!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length: expected at least 2 tokens, found {self.max_length}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row (or a part of one) as tokens.

    Attributes:
        source: "file:line".
        text: the rendered text.
        ids, weights: as in ``Example``, after truncation.
        starts, ends: the characters of ``text`` that each token covers.
        turns: the trained assistant turns: message index, first character, end (after the end token).
        notes: keys of ``NOTES``.
        length: number of tokens before truncation.
        lost: number of trained tokens that were cut off.
        stops: the token at the end of each trained turn, or of a text, after which generation has to stop.
        typed: control strings that are part of the row's own text and stay text.
        answer: in preference data "chosen", "rejected", "desirable" or "undesirable": the answer of this part.
        labels, second: as in ``Example``, of a labelled row.
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
    stops: tuple[int, ...] = ()
    typed: tuple[str, ...] = ()
    answer: str = ""
    labels: tuple[float, ...] = ()
    second: int = 0

    @property
    def trained(self) -> int:
        """The number of tokens with a weight."""
        return len(self.weights) - self.weights.count(0.0)

    @property
    def example(self) -> Example:
        """The training example."""
        desirable = self.answer != "undesirable"
        return Example(self.ids, self.weights, self.source, (), self.labels, self.second, desirable)
