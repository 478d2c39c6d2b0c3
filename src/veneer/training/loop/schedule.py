"""Learning rate schedules as functions of the step: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math


def learning_rate_at(step: int, *, peak: float, schedule: str, warmup: int, steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) of ``steps``.

    It rises linearly over ``warmup`` steps, starting above zero, and then stays (``constant``) or decays to zero at the end (``linear``,
    ``cosine``).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    return peak * left if schedule == "linear" else peak * 0.5 * (1 - math.cos(math.pi * left))
