"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), and IPO (Azar et al. 2023, arXiv 2310.12036).

    delta = log pi(chosen) / pi_ref(chosen) - log pi(rejected) / pi_ref(rejected)
    sigmoid:  -(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta),   e the label smoothing (equation 7 for e = 0)
    ipo:      (delta / tokens - 1 / (2 beta))^2,                               each log-ratio divided by its answer's tokens

pi_ref is the same base without the job's adapter, so there is no second model in memory.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from veneer.training.tasks.preference import CHOSEN, REJECTED, Answers, PreferenceTask


class DPO(PreferenceTask):
    """Direct preference optimization."""

    name: ClassVar[str] = "dpo"
    reference: ClassVar[bool] = True
    rate: ClassVar[float] = 1 / 50
    """TRL's default is 1e-6 for full fine-tuning, a fiftieth of the rate that this package's default assumes for it."""

    def rewards(self, answers: Answers) -> Tensor:
        """Rewards beta log pi / pi_ref (section 4 of the paper), [P, 2]."""
        return self.options.beta * (answers.logps_P2 - answers.reference_P2)

    def pair_losses(self, answers: Answers) -> Tensor:
        """The loss of each pair, [P]."""
        beta, smoothing = self.options.beta, self.options.label_smoothing
        ratios_P2 = answers.logps_P2 - answers.reference_P2
        if self.options.preference_loss == "ipo":
            means_P2 = ratios_P2 / answers.tokens_P2
            return (means_P2[:, CHOSEN] - means_P2[:, REJECTED] - 1 / (2 * beta)) ** 2
        scaled = beta * (ratios_P2[:, CHOSEN] - ratios_P2[:, REJECTED])
        return -(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)
