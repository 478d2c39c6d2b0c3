"""Predictions of a classifier's head for labelled rows, under one route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters import Bank
from veneer.adapters.runtime.route import Route, RouteLike
from veneer.adapters.sequence import lengthen, running
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.evaluate.losses import groups_by_length
from veneer.kernels.token_losses import token_losses
from veneer.models.flat import FlatRunner


@dataclass(frozen=True)
class Predictions:
    """Outputs of a head for the K supervised tokens (or texts) of n examples.

    Attributes:
        logits_KL: outputs, fp32 on the CPU.
        targets_K: the labels as numbers.
        losses_K: the loss of each.
        owner_K: the example of each, ascending.
    """

    logits_KL: Tensor
    targets_K: Tensor
    losses_K: Tensor
    owner_K: Tensor

    @property
    def values_K(self) -> Tensor:
        """The predicted classes, or the predicted numbers of a head with one output."""
        return self.logits_KL[:, 0] if self.logits_KL.shape[1] == 1 else self.logits_KL.argmax(1)

    @property
    def probabilities_KL(self) -> Tensor:
        """The probability of each class."""
        return self.logits_KL.softmax(1)


@torch.no_grad()
def predict(
    runner: FlatRunner,
    examples: Sequence[Example],
    *,
    bank: Bank,
    route: RouteLike,
    tokens_per_pass: int = 2048,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """The outputs of the head for every example, in their order.

    tokens_per_pass: most tokens at once. turn: a context that holds the model for one pass. progress: called with the number of examples
    done.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    done = 0
    for group in groups_by_length(examples, tokens_per_pass):
        batch = make_batch([examples[i] for i in group], "held-out")
        batch, before = lengthen(bank, batch, [Route.parse(route).mixes[0]] * len(group))
        keep = batch.weights.nonzero().squeeze(1)
        flat, (targets_K,) = runner.send(batch, batch.targets[keep])
        acting = bank.use(route, keep=runner.head_cells(flat, keep), training=False)
        with turn(), running(runner, before), acting:
            logits_KL = runner.logits(flat, keep).float().cpu()
        owner_K = torch.tensor(group)[torch.searchsorted(batch.offsets, keep, right=True) - 1]
        found.append((logits_KL, targets_K.cpu(), owner_K))
        done += len(group)
        if progress is not None:
            progress(done)
    logits_KL, targets_K, owner_K = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = owner_K.argsort(stable=True)
    logits_KL, targets_K = logits_KL[order], targets_K[order]
    return Predictions(logits_KL, targets_K, token_losses(logits_KL, targets_K), owner_K[order])
