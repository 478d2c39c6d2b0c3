"""The learning rate as a function of the step."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.training.loop.schedule import learning_rate_at


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_it_rises_then_stays_or_falls(schedule: str, expected: list[float]) -> None:
    """Four steps of warm-up, the first of which already moves, and four of the schedule, the last of which still moves."""
    found = [learning_rate_at(step, peak=1.0, schedule=schedule, warmup=4, steps=8) for step in range(8)]
    assert found == pytest.approx(expected, abs=1e-6)


@given(
    st.integers(1, 300), st.integers(0, 400), st.sampled_from(["constant", "linear", "cosine"]), st.floats(1e-8, 1e3)
)
def test_it_is_never_above_the_peak_or_below_zero(steps: int, warmup: int, schedule: str, peak: float) -> None:
    """For any lengths, a warm-up longer than the run among them, every step has a rate within (0, peak]."""
    rates = [learning_rate_at(step, peak=peak, schedule=schedule, warmup=warmup, steps=steps) for step in range(steps)]
    assert all(0 < r <= peak * (1 + 1e-12) for r in rates)
    rising = rates[: warmup + 1]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(rising))
