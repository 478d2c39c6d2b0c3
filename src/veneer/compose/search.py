"""Searching the weights of a mix on a validation set, without gradients.

Task arithmetic with a searched weight per adapter is what holds up best when adapters meet that were trained apart (science of merging:
arXiv 2511.21437); LoraHub (arXiv 2307.13269) searches the same way. What a mix scores is asked of the caller, so that this file knows
neither models nor data: since a mix acts exactly as a route, nothing has to be composed while searching.

The search asks for each adapter alone, their average and their sum, and goes on from the best by trying one weight at a time, with a
step that halves whenever no single change helps (a compass search; Kolda, Lewis and Torczon 2003). It is deterministic and its result is
never worse than any of the mixes that it began with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from veneer.errors import ComposeError

Score = Callable[[tuple[float, ...]], float]
"""Weights -> a loss: the lower the better."""


@dataclass(frozen=True)
class Searched:
    """The best weights, their score and every mix that was tried, in order."""

    weights: tuple[float, ...]
    score: float
    tried: tuple[tuple[tuple[float, ...], float], ...]

    def score_of(self, weights: Sequence[float]) -> float | None:
        """The score of a mix that was tried."""
        return dict(self.tried).get(tuple(weights))


def search_weights(
    score: Score, count: int, *, budget: int = 40, step: float = 0.25, least: float = 0.02, bound: float = 1.5
) -> Searched:
    """The weights of ``count`` adapters with the lowest score.

    budget: how many mixes are scored at most. step: the first change of a weight; the search ends when it falls below ``least``.
    bound: the largest absolute weight. Raises ComposeError where no mix has a finite score, or the budget does not allow the first ones.
    """
    first = starts(count)
    if budget < len(first):
        raise ComposeError(f"budget: {len(first)} mixes are scored before the search begins; found {budget}")
    tried: dict[tuple[float, ...], float] = {}

    def ask(weights: tuple[float, ...]) -> float:
        if weights not in tried:
            value = float(score(weights))
            tried[weights] = value if math.isfinite(value) else math.inf
        return tried[weights]

    best = min(first, key=ask)
    while step >= least and len(tried) < budget:
        better = _improve(best, ask, step, bound, lambda: len(tried) < budget)
        best, step = (better, step) if better != best else (best, step / 2)
    if tried[best] == math.inf:
        raise ComposeError(
            "the search found no mix with a finite score; look at the data and at the adapters one by one"
        )
    return Searched(best, tried[best], tuple(tried.items()))


def starts(count: int) -> list[tuple[float, ...]]:
    """Mixes to begin with: each adapter alone, their average, their sum."""
    alone = [tuple(float(i == j) for j in range(count)) for i in range(count)]
    return list(dict.fromkeys([*alone, (1 / count,) * count, (1.0,) * count]))


def _improve(
    best: tuple[float, ...],
    ask: Callable[[tuple[float, ...]], float],
    step: float,
    bound: float,
    going: Callable[[], bool],
) -> tuple[float, ...]:
    """One round over all weights: each is moved up or down by ``step`` where that helps."""
    for place in range(len(best)):
        for change in (step, -step):
            moved = max(-bound, min(bound, round(best[place] + change, 6)))
            other = (*best[:place], moved, *best[place + 1 :])
            if going() and ask(other) < ask(best):
                best = other
                break
    return best
