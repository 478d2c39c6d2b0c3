"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306): answers to learn or to avoid, without pairs.

    r = log pi(y|x) / pi_ref(y|x),   z = max(0, mean over the step of log pi(y'|x) / pi_ref(y'|x))
    loss = w_D (1 - sigmoid(beta (r - z)))   for an answer to learn,   w_U (1 - sigmoid(beta (z - r)))   for one to avoid

z estimates KL(pi || pi_ref) (section 4.1). y' is the answer of the row before in the step, that of the last row for the first; z has
no gradient. It is a figure of the whole step, so it does not depend on how the step is cut into passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from veneer.data.example import Example
from veneer.evaluate.losses import Losses
from veneer.training.tasks.base import Task, TaskLosses, TaskScores, TokenLosses


class KTO(Task):
    """Kahneman-Tversky optimization."""

    name: ClassVar[str] = "kto"
    rows_format: ClassVar[str | None] = "unpaired"
    reference: ClassVar[bool] = True
    rate: ClassVar[float] = 1 / 50
    """As for DPO: TRL's default is 1e-6 for full fine-tuning."""
    has_units: ClassVar[bool] = True

    kl = 0.0
    """z of the current step."""

    def compared(self, examples: Sequence[Example]) -> list[Example]:
        """Each prompt with the answer of the example before."""
        return [mismatched(one, other, self.longest) for other, one in pairwise([examples[-1], *examples])]

    def begin_step(self, losses: Losses, reference: Losses) -> None:
        """Estimate z."""
        self.kl = divergence(losses.sums, reference.sums)

    def losses(self, tokens: TokenLosses) -> TaskLosses:
        """The losses of the answers of a pass."""
        assert tokens.reference_S is not None
        logps_S, _ = tokens.sums()
        wanted_S = torch.tensor([segment not in tokens.undesirable for segment in tokens.segments])
        losses_S = self._losses(logps_S - tokens.reference_S, wanted_S.to(logps_S.device), self.kl)
        return TaskLosses(losses_S, torch.ones(len(losses_S)), torch.tensor(tokens.segments))

    def _losses(self, ratios_S: Tensor, wanted_S: Tensor, kl: float) -> Tensor:
        signs_S = torch.where(wanted_S, 1.0, -1.0).to(ratios_S)
        weights_S = torch.where(wanted_S, self.options.desirable_weight, self.options.undesirable_weight).to(ratios_S)
        return weights_S * (1 - torch.sigmoid(self.options.beta * signs_S * (ratios_S - kl)))

    def sequences(self, examples: Sequence[Example]) -> list[Example]:
        """The examples, and each prompt with the answer of another."""
        return [*examples, *self.compared(examples)]

    def scores(self, examples: Sequence[Example], losses: Losses, reference: Losses | None) -> TaskScores:
        """Mean loss, the estimate of the divergence, and the mean reward of answers to learn less that of answers to avoid."""
        assert reference is not None
        n = len(examples)
        wanted_S = torch.tensor([example.desirable for example in examples])
        ratios_S = (reference.sums - losses.sums)[:n]
        kl = divergence(losses.sums[n:], reference.sums[n:])
        metrics = {"kl": kl}
        if wanted_S.any() and not wanted_S.all():
            metrics["reward_margin"] = self.options.beta * float(ratios_S[wanted_S].mean() - ratios_S[~wanted_S].mean())
        return TaskScores(float(self._losses(ratios_S, wanted_S, kl).mean()), metrics)


def divergence(losses_S: Tensor, reference_S: Tensor) -> float:
    """max(0, mean log-ratio) of sequences with these summed cross-entropies under the model and its reference."""
    return max(0.0, float((reference_S - losses_S).mean()))


def mismatched(one: Example, other: Example, longest: int | None = None) -> Example:
    """The prompt of one example with the answer of another: what stands before and after the first token with a weight."""
    (at, of_one), (start, of_other) = ((prompt_length(each), each) for each in (one, other))
    ids = (*of_one.ids[:at], *of_other.ids[start:])
    weights = (*of_one.weights[:at], *of_other.weights[start:])
    return Example(ids[:longest], weights[:longest], one.source)


def prompt_length(example: Example) -> int:
    """The number of tokens before the first with a weight."""
    return next((at for at, weight in enumerate(example.weights) if weight), len(example))
