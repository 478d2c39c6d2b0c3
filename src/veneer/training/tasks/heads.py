"""Tasks with a head: the label of a text or of a pair, a number, or the label of each word.

The loss of a text (or word) is its cross-entropy, or for numbers the squared error; ``kernels/token_losses.py`` computes both.
"""

from __future__ import annotations

from typing import ClassVar

from veneer.training.tasks.base import Task


class Classification(Task):
    """The class of a text or of a pair."""

    name: ClassVar[str] = "classification"
    rows_format: ClassVar[str | None] = "labelled"


class Regression(Task):
    """A number for a text or a pair."""

    name: ClassVar[str] = "regression"
    rows_format: ClassVar[str | None] = "labelled"


class TokenClassification(Task):
    """The class of each word."""

    name: ClassVar[str] = "token-classification"
    rows_format: ClassVar[str | None] = "labelled"
