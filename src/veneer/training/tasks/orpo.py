"""Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691), which needs no reference.

    loss = -log P(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)),   odds(y) = P(y) / (1 - P(y))

P(y) is the geometric mean of the probabilities of the answer's tokens (equations 3 to 7; beta is the paper's lambda).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.training.tasks.preference import CHOSEN, REJECTED, Answers, PreferenceTask


class ORPO(PreferenceTask):
    """Odds ratio preference optimization."""

    name: ClassVar[str] = "orpo"
    rate: ClassVar[float] = 1 / 10
    """The paper trains with 8e-6, about a tenth of the rate for supervised fine-tuning."""

    def rewards(self, answers: Answers) -> Tensor:
        """Rewards beta log P(y), [P, 2]."""
        return self.options.beta * answers.logps_P2 / answers.tokens_P2

    def pair_losses(self, answers: Answers) -> Tensor:
        """The loss of each pair, [P]."""
        means_P2 = answers.logps_P2 / answers.tokens_P2
        log_odds_P2 = means_P2 - torch.log(-torch.expm1(means_P2.clamp(max=-1e-7)))
        ratio = F.logsigmoid(log_odds_P2[:, CHOSEN] - log_odds_P2[:, REJECTED])
        return -means_P2[:, CHOSEN] - self.options.beta * ratio
