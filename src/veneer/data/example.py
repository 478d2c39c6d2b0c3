"""One training example: token ids, and how much the loss counts the prediction of each.

    loss of an example = sum_i weights[i] * -log p(ids[i] | ids[:i])

``weights[i]`` belongs to *predicting* ``ids[i]``, so ``weights[0]`` is always 0: nothing stands before the first token.
An example says where it comes from ("rows.jsonl:17"), so that whatever goes wrong with it later can name its place.

Boundary: plain Python, no tensors. ``batch.py`` puts examples behind each other as tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from veneer.errors import DataError

__all__ = ["Example"]


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, a loss weight for each, and the place in a file that they come from.

    Attributes:
        ids: token ids, at least one.
        weights: as long as ``ids``; finite, not negative; the first is 0 because nothing predicts the first token.
        source: "file:line" (or "file:row 3" where a file has no lines), for messages.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.weights):
            raise DataError(
                f"{self.source or 'example'}: expected one weight per token, found {len(self.ids)} ids and "
                f"{len(self.weights)} weights."
            )
        if not self.ids:
            raise DataError(f"{self.source or 'example'}: expected at least one token, found none.")
        if self.weights[0] != 0.0:
            raise DataError(
                f"{self.source or 'example'}: the first token has weight {self.weights[0]:g}, but nothing predicts it; "
                "give it weight 0."
            )
        if not all(math.isfinite(w) and w >= 0.0 for w in self.weights):
            raise DataError(f"{self.source or 'example'}: weights must be finite and not negative.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        """How many tokens the loss counts."""
        return len(self.weights) - self.weights.count(0.0)
