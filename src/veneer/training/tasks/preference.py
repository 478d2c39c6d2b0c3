"""The common part of tasks on preference data: each example is a chosen and a rejected answer, and its loss compares the two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veneer.data.example import Example
from veneer.evaluate.losses import Losses
from veneer.training.tasks.base import Task, TaskLosses, TaskScores, TokenLosses

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True)
class Answers:
    """P pairs of answers, the chosen one first.

    Attributes:
        logps_P2: summed log-probabilities of the answers' tokens.
        tokens_P2: numbers of their tokens.
        reference_P2: as ``logps_P2``, under the model without the job's adapter; zeros for a task without a reference.
    """

    logps_P2: Tensor
    tokens_P2: Tensor
    reference_P2: Tensor

    @classmethod
    def of(cls, logps_S: Tensor, tokens_S: Tensor, reference_S: Tensor | None) -> Answers:
        """Pairs of consecutive segments."""
        reference_S = torch.zeros_like(logps_S) if reference_S is None else reference_S
        logps_P2, tokens_P2, reference_P2 = (each.view(-1, 2) for each in (logps_S, tokens_S, reference_S))
        return cls(logps_P2, tokens_P2, reference_P2)


class PreferenceTask(Task, ABC):
    """The base class of tasks on preference data."""

    rows_format: ClassVar[str | None] = "preference"
    has_units: ClassVar[bool] = True

    @abstractmethod
    def pair_losses(self, answers: Answers) -> Tensor:
        """The loss of each pair, [P]."""

    @abstractmethod
    def rewards(self, answers: Answers) -> Tensor:
        """The implicit reward of each answer, [P, 2]."""

    def losses(self, tokens: TokenLosses) -> TaskLosses:
        """The losses of the pairs of a pass."""
        losses_P = self.pair_losses(Answers.of(*tokens.sums(), tokens.reference_S))
        return TaskLosses(losses_P, torch.ones(len(losses_P)), torch.tensor(tokens.segments[::2]))

    def scores(self, examples: Sequence[Example], losses: Losses, reference: Losses | None) -> TaskScores:
        """Mean loss, share of pairs whose chosen answer has the higher reward (a tie counts half), and mean difference of the rewards."""
        answers = Answers.of(-losses.sums, losses.weights, None if reference is None else -reference.sums)
        rewards = self.rewards(answers)
        margins = rewards[:, CHOSEN] - rewards[:, REJECTED]
        accuracy = (margins.sign() + 1).mean() / 2
        metrics = {"reward_accuracy": float(accuracy), "reward_margin": float(margins.mean())}
        return TaskScores(float(self.pair_losses(answers).mean()), metrics)
