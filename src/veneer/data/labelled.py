"""Rendering of labelled rows: the tokens of one text or of a pair, as the tokenizer frames them for a classifier, with the label.

    one text     [CLS] the film is fun [SEP]                     the label at the first token
    two texts    [CLS] it rains [SEP] the street is wet [SEP]    the second text's tokens have type 1
    words        [CLS] Ann ##a lives in Oslo [SEP]               a label at the first token of each word

A tokenizer that puts nothing between two texts gets a line break. Control strings in a text stay text, as in ``chat/render.py``. Where a
label is counted for the whole text, the head decides which token's state it reads (``models/classifiers/pooling.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from veneer.data.chat.rendered import Rendered, RenderOptions
from veneer.data.chat.template import reserved_error
from veneer.data.encode import Encoder, GuardedText
from veneer.data.labels import Classes, number_of
from veneer.data.rows.json_rows import describe
from veneer.data.rows.row import BadRow, Row
from veneer.errors import DataError

__all__ = ["LABELLED_TASKS", "LabelledRenderer", "LabelledTask"]

LabelledTask = Literal["classification", "regression", "token-classification"]
LABELLED_TASKS: tuple[LabelledTask, ...] = ("classification", "regression", "token-classification")
_BLOCK = 256


class LabelledRenderer:
    """Renders labelled rows with one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        task: the meaning of the labels.
        classes: the classes of the training rows; empty for regression.
        options: ``max_length`` and ``vocab_size`` apply.
        unlabelled: accept rows without a label, for prediction.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: LabelledTask,
        classes: Classes,
        options: RenderOptions | None = None,
        *,
        unlabelled: bool = False,
    ) -> None:
        self.task = task
        self.classes = classes
        self.options = options or RenderOptions()
        self.encoder = Encoder(tokenizer)
        self.unlabelled = unlabelled
        self._frames = _Frames(tokenizer)

    def notices(self, format: str) -> list[str]:
        """Describe how rows are rendered, one line each; empty if it goes without saying."""
        return []

    def render_many(
        self, rows: Iterable[Row | BadRow]
    ) -> Iterator[tuple[Row, list[Rendered]] | tuple[Row | None, BadRow]]:
        """Render rows in order: yields each row with its example, or with the reason why it is refused."""
        block: list[Row | BadRow] = []
        for row in rows:
            block.append(row)
            if len(block) == _BLOCK:
                yield from self._render_block(block)
                block = []
        yield from self._render_block(block)

    def _render_block(self, rows: list[Row | BadRow]) -> list[Any]:
        planned: list[tuple[Row, list[str], list[float]] | tuple[Row | None, BadRow]] = []
        for row in rows:
            if isinstance(row, BadRow):
                planned.append((None, row))
                continue
            try:
                planned.append((row, self._texts(row), self._labels(row)))
            except DataError as error:
                planned.append((row, BadRow(row.source, row.key, str(error))))
        texts = [text for plan in planned if len(plan) == 3 for text in plan[1]]
        encoded = iter(self.encoder.encode([self._guarded(text) for text in texts]) if texts else [])
        found: list[Any] = []
        for plan in planned:
            if len(plan) == 2:
                found.append(plan)
                continue
            row, parts, labels = plan
            pieces = [next(encoded).ids for _ in parts]
            try:
                found.append((row, [self._finish(row, parts, pieces, labels)]))
            except DataError as error:
                found.append((row, BadRow(row.source, row.key, str(error))))
        return found

    def _texts(self, row: Row) -> list[str]:
        """The texts that are encoded one by one."""
        if self.task == "token-classification":
            # Byte-level tokenizers see a word's leading space.
            texts = [word if not at or not self._frames.spaces else f" {word}" for at, word in enumerate(_words(row))]
        elif row.second and not self._frames.middle:
            texts = [f"{row.text}\n{row.second}"]
        else:
            texts = [row.text, row.second] if row.second else [row.text]
        for text in texts:
            if (found := self.encoder.reserved.search(text)) is not None:
                raise reserved_error(found.group())
        return texts

    def _labels(self, row: Row) -> list[float]:
        if row.label is None and self.unlabelled:
            return [0.0] * (len(_words(row)) if self.task == "token-classification" else 1)
        try:
            if self.task == "regression":
                return [number_of(row.label)]
            if self.task == "classification":
                return [float(self.classes.number(row.label))]
            return self._word_labels(row)
        except DataError as error:
            raise DataError(f"label: {error}") from None

    def _word_labels(self, row: Row) -> list[float]:
        if not isinstance(row.label, list):
            raise DataError(f"expected a list with a label for each word, found {describe(row.label)}")
        words = len(_words(row))
        if len(row.label) != words:
            raise DataError(f"expected a label for each of {words} words, found {len(row.label)}")
        return [float(self.classes.number(label)) for label in row.label]

    def _guarded(self, text: str) -> GuardedText:
        return GuardedText(text, tuple(match.span() for match in self.encoder.control_pattern.finditer(text)))

    def _finish(self, row: Row, texts: list[str], pieces: list[list[int]], labels: list[float]) -> Rendered:
        frames, limit = self._frames, self.options.max_length
        words = self.task == "token-classification"
        parts = [[token for piece in pieces for token in piece]] if words else pieces
        before, middle, after = (frames.before, frames.middle, frames.after)
        whole = sum(map(len, parts)) + len(before) + len(after) + (len(middle) if len(parts) > 1 else 0)
        parts = _cut(parts, whole - limit) if limit is not None and whole > limit else parts
        ids = [*before, *parts[0]]
        second = 0
        if len(parts) > 1:
            ids += middle
            second = len(ids) if frames.typed else 0
            ids += parts[1]
        ids += after
        if not ids:
            raise DataError("the row has no tokens")
        if self.options.vocab_size is not None and max(ids) >= self.options.vocab_size:
            raise DataError(
                f"token {max(ids)} is beyond the base's embedding of {self.options.vocab_size} tokens; use the tokenizer that the "
                "base was trained with"
            )
        at = _first_tokens(pieces, len(before), len(before) + len(parts[0])) if words else [0]
        seen = pieces if words else [ids]
        lost = sum(map(bool, seen)) - sum(token is not None for token in at)
        values, weights = [0.0] * len(ids), [0.0] * len(ids)
        for token, label in zip(at, labels, strict=False):
            if token is not None:
                values[token], weights[token] = label, 1.0
        return Rendered(
            source=row.source,
            text="\n".join(texts),
            ids=tuple(ids),
            weights=tuple(weights),
            starts=(),
            ends=(),
            turns=(),
            notes=(),
            length=whole,
            lost=lost,
            labels=tuple(values),
            second=second,
        )


class _Frames:
    """The tokens that a tokenizer puts before, between and behind texts, found with two texts of one letter."""

    def __init__(self, tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        pair = backend.encode("a", "b")
        first = [at for at, text in enumerate(pair.sequence_ids) if text == 0 and not pair.special_tokens_mask[at]]
        last = [at for at, text in enumerate(pair.sequence_ids) if text == 1 and not pair.special_tokens_mask[at]]
        self.before: list[int] = pair.ids[: first[0]]
        self.middle: list[int] = pair.ids[first[-1] + 1 : last[0]]
        self.after: list[int] = pair.ids[last[-1] + 1 :]
        self.typed = pair.type_ids[last[0]] == 1 and bool(self.middle)
        self.spaces = (
            len(backend.encode(" a", add_special_tokens=False).ids)
            and backend.encode(" a", add_special_tokens=False).ids != backend.encode("a", add_special_tokens=False).ids
        )


def _words(row: Row) -> tuple[str, ...]:
    return row.words or tuple(row.text.split())


def _cut(parts: list[list[int]], surplus: int) -> list[list[int]]:
    """Cut the ends of texts, the longer one first, by ``surplus`` tokens together."""
    lengths = [len(part) for part in parts]
    for _ in range(surplus):
        longest = max(range(len(lengths)), key=lambda at: lengths[at])
        lengths[longest] = max(0, lengths[longest] - 1)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def _first_tokens(pieces: list[list[int]], start: int, end: int) -> list[int | None]:
    """The first token of each word in a frame that begins at ``start``; None for words without tokens or behind ``end``."""
    found: list[int | None] = []
    at = start
    for piece in pieces:
        found.append(at if piece and at < end else None)
        at += len(piece)
    return found
