"""Searching the weights of a mix on a validation set, without gradients.

Task arithmetic with a searched weight per adapter holds up best for adapters that were trained apart (arXiv 2511.21437); LoraHub
(arXiv 2307.13269) searches the same way. The caller scores each mix, so this file knows neither models nor data: a mix acts exactly as a
route, and nothing has to be composed during the search.

The search scores each adapter alone, their average and their sum, and continues from the best by changing one weight at a time, with a
step that halves whenever no single change helps (a compass search; Kolda, Lewis and Torczon 2003). It is deterministic, and its result is
never worse than any of the first mixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from veneer.errors import ComposeError

Score = Callable[[tuple[float, ...]], float]
"""Weights -> a loss (lower is better)."""


@dataclass(frozen=True)
class SearchResult:
    """The best weights, their score and every mix that was tried, in order."""

    weights: tuple[float, ...]
    score: float
    tried: tuple[tuple[tuple[float, ...], float], ...]


def search_weights(
    score: Score, count: int, *, budget: int = 40, step: float = 0.25, least: float = 0.02, bound: float = 1.5
) -> SearchResult:
    """Search the weights of ``count`` adapters with the lowest score.

    Args:
        score: the loss of a mix.
        count: number of adapters.
        budget: the largest number of mixes to score.
        step: the first change of a weight; the search ends when it falls below ``least``.
        least: the smallest step.
        bound: the largest absolute weight.

    Raises:
        ComposeError: no mix has a finite score, or the budget is smaller than the number of first mixes.
    """
    first = starts(count)
    if budget < len(first):
        raise ComposeError(
            f"budget: {len(first)} mixes are scored before the search begins, found {budget}; give a larger budget"
        )
    tried: dict[tuple[float, ...], float] = {}

    def loss_of(weights: tuple[float, ...]) -> float:
        if weights not in tried:
            value = float(score(weights))
            tried[weights] = value if math.isfinite(value) else math.inf
        return tried[weights]

    best = min(first, key=loss_of)
    while step >= least and len(tried) < budget:
        better = _improve(best, loss_of, step, bound, lambda: len(tried) < budget)
        best, step = (better, step) if better != best else (best, step / 2)
    if tried[best] == math.inf:
        raise ComposeError(
            "the search found no mix with a finite score; check the data and evaluate the adapters one by one"
        )
    return SearchResult(best, tried[best], tuple(tried.items()))


def starts(count: int) -> list[tuple[float, ...]]:
    """The first mixes: each adapter alone, their average, their sum."""
    alone = [tuple(float(i == j) for j in range(count)) for i in range(count)]
    return list(dict.fromkeys([*alone, (1 / count,) * count, (1.0,) * count]))


def _improve(
    best: tuple[float, ...],
    loss_of: Callable[[tuple[float, ...]], float],
    step: float,
    bound: float,
    within_budget: Callable[[], bool],
) -> tuple[float, ...]:
    """One round over all weights: move each up or down by ``step`` where that lowers the loss."""
    for index in range(len(best)):
        for change in (step, -step):
            moved = max(-bound, min(bound, round(best[index] + change, 6)))
            other = (*best[:index], moved, *best[index + 1 :])
            if within_budget() and loss_of(other) < loss_of(best):
                best = other
                break
    return best
