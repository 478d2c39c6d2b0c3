"""Text from tokens as they come: whole characters only, and an end at stop strings that may begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
_CONTEXT = 8
"""Tokens of the prompt that the first token's text may depend on (a space before a word)."""


class TokenText:
    """Text of one sequence's tokens.

    Args:
        tokenizer: a tokenizer of transformers, fast or slow.
        prompt: what precedes the text.
        skip_special_tokens: leave control tokens out.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._before = list(prompt[-_CONTEXT:])
        self._pending: list[int] = []
        """Tokens whose text is not complete."""
        self._stream: Any = self._opened()

    def _opened(self) -> Any:
        if self._fast is None:
            return None
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=self._before, skip_special_tokens=self._skip)

    def add(self, token: int) -> str:
        """The text that a further token completes; empty while a character is incomplete."""
        self._pending.append(token)
        if self._fast is None:
            text = self._tail()
            if text.endswith(_UNFINISHED):
                return ""
        else:
            try:
                found = self._stream.step(self._fast, token)
            except Exception as error:
                if "Invalid prefix" not in str(error):
                    raise
                # The stream lost its place in a run of broken characters; it starts again behind what it was given.
                found = self._tail()
                self._before = (self._before + self._pending)[-_CONTEXT:]
                self._stream = self._opened()
                self._pending = []
                return found
            if found is None:
                return ""
            text = found
        self._before = (self._before + self._pending)[-_CONTEXT:]
        self._pending = []
        return str(text)

    def end(self) -> str:
        """The text of tokens that completed no character."""
        text, self._pending = self._tail(), []
        return text

    def _tail(self) -> str:
        if not self._pending:
            return ""
        before = self._decode(self._before)
        whole = self._decode([*self._before, *self._pending])
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._pending)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and finds the first that is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """(text that is certain, the stop string that was found). After one was found, everything behind it is dropped."""
        if not self._stops:
            return text, None
        held = self._held + text
        found = min(((at, -len(stop), stop) for stop in self._stops if (at := held.find(stop)) >= 0), default=None)
        if found is not None:
            self._held = ""
            return held[: found[0]], found[2]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def end(self) -> str:
        """The text that was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
