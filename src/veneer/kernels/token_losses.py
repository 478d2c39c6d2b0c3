"""The loss of each supervised token or text, by the kind of its target.

next tokens, classes    -log p(target)           targets [K] long, or numbers of classes as floats
numbers                 (output - target)^2      targets [K] floats, and a head with one output
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["token_losses"]


def token_losses(logits_KV: Tensor, targets_K: Tensor) -> Tensor:
    """Losses [K] in fp32. Outputs of -inf are not classes of the row."""
    if targets_K.is_floating_point() and logits_KV.shape[1] == 1:
        return (logits_KV[:, 0].float() - targets_K).square()
    return F.cross_entropy(logits_KV.float(), targets_K.long(), reduction="none")
