"""One training example: token ids with a loss weight for each.

    loss of an example = sum_i weights[i] * -log p(ids[i] | ids[:i])

An example of preference data has two sequences, the prompt with the chosen answer and the prompt with the rejected one, which share a
loss (``training/tasks/``). They stand behind each other in ``ids``, and ``lengths`` tells them apart.

``weights[i]`` is the weight of predicting ``ids[i]``, so ``weights[0]`` is always 0: nothing predicts the first token.
An example with ``labels`` is for a head that reads the text: ``weights[i]`` is the weight of predicting ``labels[i]`` at token i.
``source`` ("rows.jsonl:17") lets later errors name the row. ``batch.py`` concatenates examples as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from veneer.errors import DataError

__all__ = ["Example"]


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, a loss weight for each, and their source.

    Attributes:
        ids: token ids, at least one.
        weights: as long as ``ids``; finite, not negative; without labels the first is 0 because nothing predicts the first token.
        source: "file:line" ("file:row 3" for a file without lines), for messages to the user.
        lengths: tokens of each sequence, where an example has several; empty for one. The first weight of each is 0.
        labels: empty, or as long as ``ids``: the number of a class or a value to predict at each token with a weight.
        second: the token at which the second of two texts begins; 0 for one text.
        desirable: False for an answer that the model is to avoid (KTO).

    Raises:
        DataError: ids and weights do not satisfy this.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    source: str = ""
    lengths: tuple[int, ...] = ()
    labels: tuple[float, ...] = ()
    second: int = 0
    desirable: bool = True

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.weights):
            raise DataError(
                f"{self.source or 'example'}: expected one weight per token, found {len(self.ids)} ids and "
                f"{len(self.weights)} weights"
            )
        if not self.ids:
            raise DataError(f"{self.source or 'example'}: expected at least one token, found none")
        if self.labels and len(self.labels) != len(self.ids):
            raise DataError(
                f"{self.source or 'example'}: expected one label per token, found {len(self.ids)} ids and "
                f"{len(self.labels)} labels"
            )
        if self.weights[0] != 0.0 and not self.labels:
            raise DataError(
                f"{self.source or 'example'}: the first token has weight {self.weights[0]:g}, but nothing predicts it; "
                "set it to 0"
            )
        if self.lengths and (min(self.lengths) < 1 or sum(self.lengths) != len(self.ids)):
            raise DataError(
                f"{self.source or 'example'}: expected sequences of {len(self.ids)} tokens in all, found the lengths "
                f"{', '.join(map(str, self.lengths))}"
            )
        if not all(math.isfinite(w) and w >= 0.0 for w in self.weights):
            raise DataError(f"{self.source or 'example'}: expected weights that are finite and not negative")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_sequences(cls, sequences: Sequence[Example]) -> Example:
        """One example of several sequences that share a loss."""
        ids = tuple(token for sequence in sequences for token in sequence.ids)
        weights = tuple(weight for sequence in sequences for weight in sequence.weights)
        return cls(ids, weights, sequences[0].source, tuple(map(len, sequences)))

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The sequences, each as an example of its own."""
        if not self.lengths:
            return (self,)
        edges = [0, *accumulate(self.lengths)]
        return tuple(Example(self.ids[a:b], self.weights[a:b], self.source) for a, b in pairwise(edges))

    @property
    def trained(self) -> int:
        """The number of tokens with a weight."""
        return len(self.weights) - self.weights.count(0.0)
