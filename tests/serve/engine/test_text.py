"""Text comes in whole characters, and stop strings are found wherever tokens split them."""

from __future__ import annotations

import random

import pytest
from tests.tiny import tiny_tokenizer

from veneer.serve.engine.text import StopStrings, TokenText


@pytest.mark.parametrize("text", ["plain words here", "Grüße, 日本語 🙂🙃 ok", "a<|im_start|>b", "\ufffd stays"])
def test_pieces_join_to_the_whole(text: str) -> None:
    """The pieces are those of the whole text, and none ends inside a character."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    made = TokenText(tokenizer, tokenizer("prompt")["input_ids"], skip_special_tokens=True)
    pieces = [made.add(token) for token in ids]
    assert "".join(pieces) + made.end() == tokenizer.decode(ids, skip_special_tokens=True)


def test_broken_bytes_do_not_stop_the_text() -> None:
    """Tokens that are no valid UTF-8 give replacement characters at the end, and text behind them goes on."""
    tokenizer = tiny_tokenizer()
    half = tokenizer("🙂")["input_ids"][:2]
    made = TokenText(tokenizer, [], skip_special_tokens=True)
    assert [made.add(token) for token in half] == ["", ""] and "\ufffd" in made.end()
    more = TokenText(tokenizer, [], skip_special_tokens=True)
    text = "".join(more.add(token) for token in [*half, *tokenizer("fine")["input_ids"]]) + more.end()
    assert text.endswith("fine")


def test_a_stop_string_is_found_across_pieces() -> None:
    """However a text is cut, what comes before the first stop string is emitted, and nothing of it."""
    text, stops = "one END two <stop> three", ("<stop>", "END two", "ND")
    for seed in range(200):
        draw, made, rest, out, found = random.Random(seed), StopStrings(stops), text, "", None
        while rest and found is None:
            cut = draw.randrange(1, 5)
            piece, rest = rest[:cut], rest[cut:]
            added, found = made.add(piece)
            out += added
        assert (out, found) in (("one E", "ND"), ("one ", "END two"))


def test_the_beginning_of_a_stop_string_is_given_back_at_the_end() -> None:
    """Text that might have become a stop string is not lost."""
    made = StopStrings(("<stop>",))
    assert made.add("a <st") == ("a ", None) and made.add("ay <s") == ("<stay ", None) and made.end() == "<s"
