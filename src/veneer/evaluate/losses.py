"""Held-out loss under several routes, and the difference between two of them with its uncertainty.

The loss of a set is the weighted mean over its tokens, L = sum_i l_i / sum_i w_i, with l_i and w_i an example's summed loss and weight.
Two routes are compared on the same examples. Their difference D = sum_i (a_i - b_i) / sum_i w_i is a ratio, whose variance over
examples is, to first order,

    var D = n / (n - 1) * sum_i ((a_i - b_i) - D w_i)^2 / (sum_i w_i)^2

so that the interval is paired (most of what makes an example hard is the same for both and cancels) and counts examples, not
tokens, as what was drawn independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from veneer.adapters import Bank
from veneer.adapters.runtime.route import Route, RouteLike
from veneer.adapters.sequence import lengthen, running
from veneer.data.batch import Batch, make_batch, packed
from veneer.data.example import Example
from veneer.errors import DataError
from veneer.kernels.token_losses import token_losses
from veneer.models.flat import FlatRunner

_LOGITS_AT_ONCE = 256
Progress = Callable[[int], None]


class Ranks(Protocol):
    """The processes that share an evaluation; ``rank`` and ``size`` say which groups of examples are computed here."""

    rank: int
    size: int

    def add_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes."""

    def fill_up(self, passes: int) -> None:
        """Run so many passes in place of groups, where all processes must run as many."""

    def common_fault(self, error: Exception | None) -> Exception | None:
        """The same fault in every process, or None if none has any."""


@dataclass(frozen=True)
class Losses:
    """Summed loss and weight of each example, [n] in fp64, in the order of the examples."""

    sums: Tensor
    weights: Tensor

    @property
    def mean(self) -> float:
        """Weighted mean loss per token, in nats."""
        return float(self.sums.sum() / self.weights.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite beyond the largest number."""
        return float(torch.tensor(self.mean, dtype=torch.float64).exp())


@dataclass(frozen=True)
class LossDifference:
    """Mean loss of one route less another's, with a 95 % interval, in nats per token."""

    mean: float
    low: float
    high: float


def example_losses(
    runner: FlatRunner,
    examples: Sequence[Example],
    *,
    bank: Bank | None = None,
    route: RouteLike = None,
    tokens_per_pass: int = 2048,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Losses:
    """The loss of each example under one route for all; no gradients, no dropout.

    tokens_per_pass: most tokens at once; a longer example goes alone. turn: a context that holds the model for one pass, where others use
    it too. progress: called with the number of examples done. ranks: the processes that share the work; each gets all losses.
    Raises DataError if no example has a weighted token.
    """
    if not any(example.trained for example in examples):
        raise DataError("none of the held-out examples has a token that the loss counts")
    sums = torch.zeros(len(examples), dtype=torch.float64)
    weights = torch.zeros(len(examples), dtype=torch.float64)
    groups = list(groups_by_length(examples, tokens_per_pass))
    if ranks is None:
        _fill(runner, examples, groups, sums, weights, bank, route, turn, progress)
        return Losses(sums, weights)
    error: Exception | None = None
    mine = groups[ranks.rank :: ranks.size]
    try:
        _fill(runner, examples, mine, sums, weights, bank, route, turn, progress)
        ranks.fill_up(-(-len(groups) // ranks.size) - len(mine))
    except Exception as found:  # every process must go on to the exchange
        error = found
    fault = ranks.common_fault(error)
    if fault is not None:
        raise fault
    both = ranks.add_(torch.stack((sums, weights)))
    return Losses(both[0], both[1])


def _fill(
    runner: FlatRunner,
    examples: Sequence[Example],
    groups: Sequence[list[int]],
    sums: Tensor,
    weights: Tensor,
    bank: Bank | None,
    route: RouteLike,
    turn: Callable[[], AbstractContextManager[None]],
    progress: Progress | None,
) -> None:
    """Add the losses and weights of the examples of these groups."""
    done = 0
    for group in groups:
        batch, before = make_batch([examples[i] for i in group], "held-out"), None
        if bank is not None:
            batch, before = lengthen(bank, batch, [Route.parse(route).mixes[0]] * len(group))
        acting = bank.use(route, training=False) if bank is not None else nullcontext()
        with torch.no_grad(), turn(), running(runner, before), acting:
            owner, loss, weight = _token_losses(runner, batch)
        index = torch.tensor(group)[owner]
        sums.index_add_(0, index, loss * weight)
        weights.index_add_(0, index, weight)
        done += len(group)
        if progress is not None:
            progress(done)


def compare(one: Losses, other: Losses) -> LossDifference:
    """``one`` less ``other``, over the same examples.

    Raises DataError where the two are not of the same examples.
    """
    if not torch.equal(one.weights, other.weights):
        raise DataError("two sets of losses can be compared only over the same examples and weights")
    n, total = one.sums.numel(), float(one.weights.sum())
    apart = one.sums - other.sums
    mean = float(apart.sum()) / total
    if n < 2:
        return LossDifference(mean, -math.inf, math.inf)
    spread = float(((apart - mean * one.weights) ** 2).sum())
    half = t95(n - 1) * math.sqrt(n / (n - 1) * spread) / total
    return LossDifference(mean, mean - half, mean + half)


def groups_by_length(examples: Sequence[Example], budget: int) -> Iterator[list[int]]:
    """Examples of like length together, at most ``budget`` tokens a group; weightless ones are left out."""
    order = sorted((i for i, e in enumerate(examples) if e.trained), key=lambda i: (len(examples[i]), i))
    return packed(order, budget, lambda i: len(examples[i]))


def _token_losses(runner: FlatRunner, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(example number, loss, weight) of each weighted token, the last two in fp64."""
    keep = runner.here(batch, batch.weights.nonzero().squeeze(1))
    owner = torch.searchsorted(batch.offsets, keep, right=True) - 1
    flat, (targets_K,) = runner.send(batch, batch.targets[keep])
    logits = runner.logits(flat, keep)
    losses = [
        token_losses(logits_kV, target_k)
        for logits_kV, target_k in zip(logits.split(_LOGITS_AT_ONCE), targets_K.split(_LOGITS_AT_ONCE), strict=True)
    ]
    return owner, torch.cat(losses).cpu().double(), batch.weights[keep].double()


def t95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t, by Cornish and Fisher's expansion in 1/degrees (within 1 % from 3 on)."""
    if degrees == 1:
        return 12.706
    if degrees == 2:
        return 4.303
    z = 1.959964
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / degrees + g2 / degrees**2 + g3 / degrees**3
