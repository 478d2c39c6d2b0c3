"""The search of weights without gradients."""

from __future__ import annotations

import math

import pytest

from veneer.compose.search import search_weights, starts
from veneer.errors import ComposeError


def test_it_finds_the_bottom_of_a_bowl() -> None:
    """On a smooth loss the weights come within the last step of the best ones, in few questions."""
    best = (0.6, -0.2, 1.1)
    found = search_weights(lambda w: sum((x - y) ** 2 for x, y in zip(w, best, strict=True)), 3, budget=120)
    assert all(abs(x - y) <= 0.032 for x, y in zip(found.weights, best, strict=True))
    assert len(found.tried) <= 120 and found.score == min(score for _, score in found.tried)


def test_it_is_never_worse_than_what_it_began_with() -> None:
    """On a loss with no structure the result still beats every adapter alone, the average and the sum."""
    found = search_weights(lambda w: math.sin(97 * w[0]) + math.cos(61 * w[1]), 2, budget=12)
    assert len(found.tried) <= 12
    for weights in starts(2):
        assert found.score <= dict(found.tried)[weights]


def test_it_is_deterministic_and_asks_once() -> None:
    """The same question is never asked twice, and a second search asks the same ones."""
    asked: list[tuple[float, ...]] = []

    def score(weights: tuple[float, ...]) -> float:
        asked.append(weights)
        return abs(weights[0] - 0.3) + abs(weights[1] - 0.4)

    first = search_weights(score, 2)
    assert len(asked) == len(set(asked)) == len(first.tried)
    assert search_weights(score, 2) == first


def test_bounds_and_losses_that_are_not_finite() -> None:
    """Weights stay within the bound; a mix whose loss is not a number loses; where all do, that is an error."""
    found = search_weights(lambda w: -w[0], 1, bound=1.5)
    assert found.weights == (1.5,)
    found = search_weights(lambda w: math.nan if w[0] > 0.9 else -w[0], 2)
    assert found.weights[0] <= 0.9
    with pytest.raises(ComposeError, match="finite score"):
        search_weights(lambda w: math.inf, 2)
    with pytest.raises(ComposeError, match="4 mixes are scored before"):
        search_weights(lambda w: 0.0, 2, budget=3)
