"""FP8 weights with a scale for each block of rows and columns, as fine-grained FP8 checkpoints store them.

    w = q * scale_inv[row // block, column // block]        q: float8; blocks at the ends may be smaller

(DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.) They are dequantized while they are read: no device computes with them here.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SCALE", "dequantize_fp8"]

SCALE = "weight_scale_inv"
"""Name, behind the layer's, of a weight's scales."""


def dequantize_fp8(weight_OK: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """The values of a weight in ``dtype``.

    Args:
        weight_OK: float8, [..., O, K].
        scale: one for each block, or a single one; bytes are exponents of two with an offset of 127.
        block: rows and columns of a block; None for a single scale, or blocks that divide the weight evenly.
        dtype: of the result.

    Raises ValueError where the scales do not fit the weight.
    """
    wide = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    if scale.numel() == 1:
        return (weight_OK.float() * wide.reshape(())).to(dtype)
    rows, columns = weight_OK.shape[-2:]
    found = tuple(scale.shape[-2:])
    sizes = block or (-(-rows // found[0]), -(-columns // found[1]))
    expected = (-(-rows // sizes[0]), -(-columns // sizes[1]))
    if scale.dim() < 2 or found != expected:
        raise ValueError(
            f"{SCALE}: expected {expected[0]} x {expected[1]} blocks of {sizes[0]} x {sizes[1]} for a weight of {rows} x {columns}, "
            f"found shape {list(scale.shape)}"
        )
    wide = wide.repeat_interleave(sizes[0], -2)[..., :rows, :].repeat_interleave(sizes[1], -1)[..., :columns]
    return (weight_OK.float() * wide).to(dtype)
