"""The learning rate as a function of the step: warm-up, then constant, linear or cosine. Nothing is remembered between steps."""

from __future__ import annotations

import math


def rate(step: int, *, peak: float, schedule: str, warmup: int, steps: int) -> float:
    """The learning rate of optimizer step ``step`` (counted from 0) of ``steps``.

    It rises linearly over ``warmup`` steps, the first of which already moves, and then stays (``constant``) or falls to zero at the
    end (``linear``, ``cosine``).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    return peak * left if schedule == "linear" else peak * 0.5 * (1 - math.cos(math.pi * left))
