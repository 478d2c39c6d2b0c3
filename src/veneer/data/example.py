"""One training example: token ids with a loss weight for each.

    loss of an example = sum_i weights[i] * -log p(ids[i] | ids[:i])

``weights[i]`` is the weight of predicting ``ids[i]``, so ``weights[0]`` is always 0: nothing predicts the first token.
``source`` ("rows.jsonl:17") lets later errors name the row. ``batch.py`` concatenates examples as tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from veneer.errors import DataError

__all__ = ["Example"]


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, a loss weight for each, and their source.

    Attributes:
        ids: token ids, at least one.
        weights: as long as ``ids``; finite, not negative; the first is 0 because nothing predicts the first token.
        source: "file:line" ("file:row 3" for a file without lines), for messages to the user.

    Raises:
        DataError: ids and weights do not satisfy this.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.weights):
            raise DataError(
                f"{self.source or 'example'}: expected one weight per token, found {len(self.ids)} ids and "
                f"{len(self.weights)} weights"
            )
        if not self.ids:
            raise DataError(f"{self.source or 'example'}: expected at least one token, found none")
        if self.weights[0] != 0.0:
            raise DataError(
                f"{self.source or 'example'}: the first token has weight {self.weights[0]:g}, but nothing predicts it; "
                "set it to 0"
            )
        if not all(math.isfinite(w) and w >= 0.0 for w in self.weights):
            raise DataError(f"{self.source or 'example'}: expected weights that are finite and not negative")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        """The number of tokens with a weight."""
        return len(self.weights) - self.weights.count(0.0)
