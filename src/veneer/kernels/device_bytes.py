"""The memory of a device."""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["device_bytes"]


@lru_cache
def device_bytes(device: torch.device) -> int | None:
    """Return the bytes of memory that a CUDA device has; None for devices that share the machine's or do not tell."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
