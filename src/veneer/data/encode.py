"""Tokenization that separates the control tokens of a template from identical text in a row.

A chat template writes ``<|im_end|>`` to end a turn. The same ten characters in a user's message must not end it: they have
to become ordinary tokens. A tokenizer cannot tell the two apart, so this module renames one of them. In a private copy of
the tokenizer every control token has another name of the same length, made of code points that no text contains (Unicode
noncharacters). Before encoding, the template's control tokens are renamed; those in the row's text are not. The result
is identical to ``tokenizer.apply_chat_template`` for a row without control strings, and since names keep their length,
character offsets stay valid.

The copy has one more token, CUT, which separates text that must not become one token (the last character of a prompt and
the first of an answer). Its id is dropped.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer

from veneer.errors import DataError

__all__ = ["Encoded", "Encoder", "GuardedText"]

_RESERVED = "\ufdd0-\ufdef"  # noncharacters: never part of text that is meant to be read by others
_LEAD, _PAD, _CUT = "\ufdd1", "\ufdd2", "\ufdd3"
_PLANE = 0xF0000  # private use, 65,534 code points: the number of the control token behind the lead character
_SINGLE_PLANE = 0x100000  # the same for control tokens of one character, which have no lead character
_PROBE = "One  probe,\n\tmany signs: 1e-4 \u00e4\u00df\u2713 (a[0] != 'b')"
_LOOKS_LIKE_CONTROL = re.compile(r"[<\[{(|\uff5c].*[>\]})|\uff5c]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GuardedText:
    """A text, and its spans [a, b) with control strings that belong to the row and stay text."""

    text: str
    guards: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids with the characters [start, end) that each covers."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def token_range(self, a: int, b: int) -> tuple[int, int]:
        """The tokens [i, j) that cover the characters [a, b)."""
        return bisect_left(self.starts, a), bisect_left(self.starts, b)

    def over(self, at: int) -> int | None:
        """The token that covers characters on both sides of the position ``at``, if there is one."""
        i = bisect_left(self.starts, at)
        return i - 1 if i > 0 and self.ends[i - 1] > at else None


class Encoder:
    """Encodes texts with one tokenizer.

    Attributes:
        specials: control tokens that the tokenizer declares special; in the text of a row they stay text.
        softs: other added tokens that the template writes (``<think>``, ``<tool_call>``); in the text of a row they stay
            text, except in an assistant's turn, where they are tokens.
        control_ids: the ids of both.
        reserved: matches code points that no row may contain, because this module uses them.
        faithful: True if decoding restores the text, up to the tokenizer's normalization.
    """

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(
                f"the tokenizer {_name(tokenizer)} does not report character offsets, which exact masks need: expected a "
                f"fast tokenizer (one with a tokenizer.json), found {type(tokenizer).__name__}"
            )
        self.tokenizer = tokenizer
        self.backend = backend
        added = backend.get_added_tokens_decoder()
        declared = set(getattr(tokenizer, "chat_control_tokens", None) or ())
        self.specials = frozenset(t.content for t in added.values() if t.special and t.content.strip())
        unmarked = [t.content for t in added.values() if not t.special]
        self.softs = frozenset(text for text in unmarked if text in declared or _soft(text, template))
        self.special_pattern = _any_of(self.specials)
        self.control_pattern = _any_of(self.specials | self.softs)
        self._alias = {text: _rename(text, k) for k, text in enumerate(sorted(self.specials | self.softs))}
        self.reserved = re.compile("[" + _RESERVED + "".join(a for a in self._alias.values() if len(a) == 1) + "]")
        self._copy, self._original = _private_copy(backend, self._alias)
        self._cut = self._copy.token_to_id(_CUT)
        self._text_of = {number: t.content for number, t in added.items() if t.content in self._alias}
        self.control_ids = frozenset(self._text_of)
        # control tokens that the vocabulary itself holds, so that plain text could become one
        self._in_vocabulary = self.control_ids - {self._copy.token_to_id(t) for t in [*self._alias.values(), _CUT]}
        self._anchors: dict[int, str] = {}
        self._normalizer = backend.normalizer
        self.faithful = self.decode(backend.encode(_PROBE, add_special_tokens=False).ids) == _PROBE
        self._spaces = self._adds_spaces()
        greedy = [t.content for t in added.values() if t.content in self._alias and (t.lstrip or t.rstrip)]
        self._greedy = re.compile(rf"\s*({_any_of(greedy).pattern})\s*") if greedy else None
        self._check_copy()

    def encode(self, texts: Sequence[GuardedText]) -> list[Encoded]:
        """Encode texts in one call, which uses all cores."""
        renamed = [self._renamed(text) for text in texts]
        encodings = self._copy.encode_batch(renamed, add_special_tokens=False)
        return [self._settle(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def encode_cut(self, text: GuardedText, cuts: Iterable[int]) -> Encoded:
        """Encode one text; no token covers characters on both sides of a position in ``cuts``.

        Raises:
            DataError: the tokenizer turns a control string of the row into a control token in any case.
        """
        positions = set(cuts)
        encoded = self._encode_cut(text, positions)
        if self._typed_controls(text, encoded):
            # the vocabulary itself contains the control string (Unigram and word models): split the string
            encoded = self._encode_cut(text, positions | {a + 1 for a, b in text.guards if b - a > 1})
            if self._typed_controls(text, encoded):
                raise DataError(
                    "the tokenizer always encodes a control string in the row's text as the control token; remove it "
                    "from the row"
                )
        return encoded

    def straddled(self, text: str, encoded: Encoded, at: int) -> bool:
        """Check if a token covers text on both sides of the position ``at``.

        Some control tokens include the white space after them (``rstrip``); that does not count right after the control
        string itself.
        """
        i = encoded.over(at)
        return i is not None and not self.ends_at(text, encoded, i, at)

    def ends_at(self, text: str, encoded: Encoded, i: int, at: int) -> bool:
        """Check if token i ends at the character ``at``, except for white space that a control token includes."""
        end, control = encoded.ends[i], self._text_of.get(encoded.ids[i])
        return end == at or (end > at and control is not None and text.endswith(control, encoded.starts[i], at))

    def plain_ids(self, text: str) -> list[int]:
        """Encode a text in which nothing is a control token."""
        return self.encode([GuardedText(text, ((0, len(text)),))])[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, including control tokens."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def decode_after(self, before: int | None, ids: Sequence[int]) -> str:
        """Decode ids as they read after the token ``before``; tokenizers drop a space at the beginning of a text."""
        if before is None:
            return self.decode(ids)
        anchor = self._anchors.get(before)
        if anchor is None:
            anchor = self._anchors[before] = self.decode([before])
        return self.decode([before, *ids])[len(anchor) :]

    def same_text(self, found: str, expected: str) -> bool:
        """Check if two texts are equal after the tokenizer's normalization (NFC, for example).

        Spaces are ignored for older SentencePiece tokenizers, which add one after every control token, and so is white
        space around control tokens that include it.
        """
        return found == expected or self._bare(found) == self._bare(expected)

    def _bare(self, text: str) -> str:
        """A text without the characters that the tokenizer does not preserve."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text).replace("\u2581", " ")  # SentencePiece's space
        if self._greedy is not None:
            text = self._greedy.sub(r"\1", text)
        return text.replace(" ", "") if self._spaces else text

    def _renamed(self, text: GuardedText) -> str:
        if not text.guards:
            return self.control_pattern.sub(self._name_of, text.text)
        edges = [0, *(edge for guard in text.guards for edge in guard), len(text.text)]
        pieces = [text.text[a:b] for a, b in pairwise(edges)]
        pieces[0::2] = [self.control_pattern.sub(self._name_of, piece) for piece in pieces[0::2]]
        return "".join(pieces)

    def _name_of(self, match: re.Match[str]) -> str:
        return self._alias[match.group()]

    def _settle(self, text: GuardedText, encoding: Any) -> Encoded:
        if text.guards and not self._in_vocabulary.isdisjoint(encoding.ids):
            return self.encode_cut(text, ())
        original = self._original
        offsets = encoding.offsets
        return Encoded([original.get(i, i) for i in encoding.ids], [a for a, _ in offsets], [b for _, b in offsets])

    def _encode_cut(self, text: GuardedText, cuts: set[int]) -> Encoded:
        positions = sorted(cuts)
        renamed = self._renamed(text)
        edges = [0, *positions, len(renamed)]
        pieces = [renamed[a:b] for a, b in pairwise(edges)]
        encoding = self._copy.encode(_CUT.join(pieces), add_special_tokens=False)
        separators = [position + k for k, position in enumerate(positions)]
        encoded = Encoded([], [], [])
        for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True):
            if token == self._cut:
                continue
            passed = bisect_left(separators, a)
            encoded.ids.append(self._original.get(token, token))
            encoded.starts.append(a - passed)
            encoded.ends.append(b - passed)
        return encoded

    def _typed_controls(self, text: GuardedText, encoded: Encoded) -> bool:
        for a, b in text.guards:
            i, j = encoded.token_range(a, b)
            if not self.control_ids.isdisjoint(encoded.ids[i:j]):
                return True
        return False

    def _adds_spaces(self) -> bool:
        control = min(self.specials, default="")
        sample = f"{control}a{control}a"
        return self.decode(self.backend.encode(sample, add_special_tokens=False).ids).endswith(f"{control} a")

    def _check_copy(self) -> None:
        sample = f" {_PROBE} ".join(sorted(self.specials | self.softs)[:50]) + _PROBE
        expected = self.tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
        if self.encode([GuardedText(sample)])[0].ids != list(expected):
            raise DataError(
                f"the tokenizer {_name(self.tokenizer)} cannot be copied: the copy gives other token ids for the same "
                "text, so exact masks are not possible"
            )


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _soft(text: str, template: str) -> bool:
    return len(text) > 2 and text in template and _LOOKS_LIKE_CONTROL.fullmatch(text) is not None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches the longest of several literal texts; it never matches if there are none."""
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=lambda t: (-len(t), t))) or "(?!)")


def _rename(text: str, number: int) -> str:
    if len(text) == 1:
        return chr(_SINGLE_PLANE + number)
    return _LEAD + chr(_PLANE + number) + _PAD * (len(text) - 2)


def _private_copy(backend: Tokenizer, alias: dict[str, str]) -> tuple[Tokenizer, dict[int, int]]:
    """Make the renamed tokenizer; also returns the original's id for each of its ids that differs."""
    # The model with its vocabulary is shared. A post-processor adds tokens and trims offsets; truncation is done by the renderer.
    copy = Tokenizer(backend.model)
    copy.normalizer, copy.pre_tokenizer, copy.decoder = backend.normalizer, backend.pre_tokenizer, backend.decoder
    added = backend.get_added_tokens_decoder()
    names = {number: alias.get(token.content, token.content) for number, token in added.items()}
    for special, numbers in groupby(sorted(added), key=lambda number: added[number].special):
        tokens = [_renamed_token(added[number], names[number]) for number in numbers]
        (copy.add_special_tokens if special else copy.add_tokens)(tokens)
    copy.add_special_tokens([AddedToken(_CUT, special=True, normalized=False)])
    mine = {copy.token_to_id(name): number for number, name in names.items()}
    return copy, {a: b for a, b in mine.items() if a is not None and a != b}


def _renamed_token(token: AddedToken, name: str) -> AddedToken:
    flags = {key: getattr(token, key) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(name, **flags)
