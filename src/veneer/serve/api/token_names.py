"""The text and the bytes of single tokens, for log-probabilities."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from veneer.serve.engine.request import TokenLogprob


class TokenNames:
    """Texts and bytes of the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = str(getattr(tokenizer, "backend_tokenizer", tokenizer).decoder)
        self._bytes_of = _byte_letters() if "ByteLevel" in decoder else None
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._cache = lru_cache(maxsize=65_536)(self._read)

    def __call__(self, token: int) -> tuple[str, bytes]:
        """(text, bytes) of a token; the text of a part of a character has replacement characters."""
        return self._cache(token)

    def _read(self, token: int) -> tuple[str, bytes]:
        if self._bytes_of is not None and token not in self._special:
            letters = self._tokenizer.convert_ids_to_tokens(token) or ""
            if all(letter in self._bytes_of for letter in letters):
                found = bytes(self._bytes_of[letter] for letter in letters)
                return found.decode(errors="replace"), found
        text = str(self._tokenizer.decode([token], skip_special_tokens=False))
        return text, text.encode()

    def chat_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        """A token of a chat completion's logprobs."""
        return {
            **self._one(entry.token, entry.logprob),
            "top_logprobs": [self._one(token, logprob) for token, logprob in entry.top],
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold; that of an impossible token is very small."""
    return max(logprob, -9999.0)


def _byte_letters() -> dict[str, int]:
    """The letter of each byte in byte-level tokenizers (GPT-2's table): printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
