"""The contract of a task, and supervised fine-tuning, which is the default.

    rows -> examples      ``rows_format`` names the rows, ``data/rows/`` and the renderer make examples of them
    outputs -> loss       ``losses`` turns the losses of the tokens into those of the units that the job's loss averages
    measurement           ``scores`` turns held-out losses into one loss and further metrics

A unit is a supervised token for supervised fine-tuning, and a pair of answers for preference data. A job's loss is the mean over
the units of its whole optimizer step, whatever the passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from veneer.config import TrainOptions
from veneer.data.example import Example
from veneer.evaluate.losses import Losses


@dataclass(frozen=True)
class TokenLosses:
    """The supervised tokens of a job in one pass.

    Attributes:
        losses_K: cross-entropy of each token, with a gradient; on the base's device.
        weights_K: their weights, on the CPU.
        owners_K: the segment of each token, on the CPU.
        segments: the job's segments, in order.
        reference_S: for a task with ``reference``, the summed log-probability of each segment under the model without the job's adapter.
        undesirable: those of the segments whose answers the model is to avoid.
    """

    losses_K: Tensor
    weights_K: Tensor
    owners_K: Tensor
    segments: tuple[int, ...]
    reference_S: Tensor | None = None
    undesirable: frozenset[int] = frozenset()

    def sums(self) -> tuple[Tensor, Tensor]:
        """(summed log-probability, summed weight) of each segment, [S]."""
        counts = [int((self.owners_K == segment).sum()) for segment in self.segments]
        # A sum over each part: index_add_ has no fixed order on a GPU, and a resumed run must end with the same bits.
        weights_K = self.weights_K.to(self.losses_K)
        logps = [-part.sum() for part in (self.losses_K * weights_K).split(counts)]
        return torch.stack(logps), torch.stack([part.sum() for part in weights_K.split(counts)])


@dataclass(frozen=True)
class TaskLosses:
    """The losses of a job's units in one pass.

    Attributes:
        losses_U: loss of each unit, with a gradient; on the base's device.
        weights_U: their weights in the job's mean, on the CPU.
        owners_U: the segment that names the source of each unit, on the CPU.
    """

    losses_U: Tensor
    weights_U: Tensor
    owners_U: Tensor


@dataclass(frozen=True)
class TaskScores:
    """The result of an evaluation: the mean loss, and further metrics by name."""

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)


def token_units(tokens: TokenLosses) -> TaskLosses:
    """Every supervised token as a unit."""
    return TaskLosses(tokens.losses_K, tokens.weights_K, tokens.owners_K)


class Task:
    """Supervised fine-tuning: the weighted mean of the tokens' cross-entropies.

    Attributes:
        name: value of the option ``task``.
        rows_format: the format that the rows must have; None for the option ``format``.
        reference: the loss compares the model with the model without the job's adapter.
        rate: factor on the default learning rate.
        has_units: the units of the loss are others than the supervised tokens (`losses`).
    """

    name: ClassVar[str] = "sft"
    rows_format: ClassVar[str | None] = None
    reference: ClassVar[bool] = False
    rate: ClassVar[float] = 1.0
    has_units: ClassVar[bool] = False

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.longest: int | None = None
        """Most tokens of a sequence that the task itself makes."""

    def sequences(self, examples: Sequence[Example]) -> list[Example]:
        """The sequences whose losses an evaluation on examples needs."""
        return [sequence for example in examples for sequence in example.sequences]

    def compared(self, examples: Sequence[Example]) -> list[Example]:
        """Sequences whose losses must be known before a step on examples, for a figure of the whole step; mostly none."""
        return []

    def begin_step(self, losses: Losses, reference: Losses) -> None:
        """Take the losses of the sequences of `compared`, under the job's route and without the job's adapter."""

    def losses(self, tokens: TokenLosses) -> TaskLosses:
        """The losses of the units of a pass."""
        return token_units(tokens)

    def scores(self, examples: Sequence[Example], losses: Losses, reference: Losses | None) -> TaskScores:
        """The result of an evaluation.

        Args:
            examples: the held-out examples.
            losses: of each of their `sequences`, under the job's route.
            reference: the same without the job's adapter, for a task with ``reference``.
        """
        return TaskScores(losses.mean)
