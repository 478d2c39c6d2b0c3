"""The options that low-rank methods share, with what they mean for the scale.

The fields themselves are declared in ``veneer.config``, so that ``LoRA(r=8)`` and a training run's ``--r 8`` are one thing. Defaults
are those that the evidence supports: every linear layer of the blocks, r = 16, lora_alpha = 32, A uniform, B zero, no dropout.
"""

from __future__ import annotations

import math

from veneer.config import Alpha, Rank
from veneer.config import LowRankOptions as Fields

__all__ = ["Alpha", "LowRankOptions", "Rank"]


class LowRankOptions(Fields):
    """What a low-rank adapter is and where it acts. Frozen; unknown names are errors."""

    def scaling(self, r: int, lora_alpha: float) -> float:
        """s in W + s B A."""
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)
