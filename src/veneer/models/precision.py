"""The data type in which this machine is fast.

bf16 halves memory and is two to four times as fast as fp32 in matrix products with native support (AVX512-BF16, AMX, Arm's BF16, GPUs since
Ampere); otherwise a CPU emulates it slowly. Only the frozen base uses it. Generation decodes token by token, bound by reading weights: with
AMX it is equally fast in both and reads the prompt three times as fast in bf16; other CPUs were not measured and use fp32.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

Purpose = Literal["train", "generate"]

_NATIVE: dict[Purpose, frozenset[str]] = {
    "train": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "generate": frozenset({"amx_bf16"}),
}


def fast_dtype(device: str | torch.device = "cpu", purpose: Purpose = "train") -> torch.dtype:
    """The dtype in which a frozen base is fastest on ``device`` for ``purpose``: torch.bfloat16 or torch.float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    return torch.bfloat16 if kind == "cpu" and _cpu_flags() & _NATIVE[purpose] else torch.float32


def slow_dtype_notes(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """A note if a GPU only emulates the dtype that was asked for."""
    if device.type == "cpu" or dtype == torch.float32 or fast_dtype(device) == dtype:
        return ()
    return (f"{device} has no units for bfloat16 and emulates it slowly; use dtype float32",)


@lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str]:
    """The CPU's feature flags in Linux's spelling; where there is no /proc, what torch can tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _flags_from_torch()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(
        flag for key, _, value in lines if key.strip().lower() in ("flags", "features") for flag in value.split()
    )


def _flags_from_torch() -> frozenset[str]:
    flags = set()
    for flag, check in (("avx512_bf16", "_is_avx512_bf16_supported"), ("amx_bf16", "_is_amx_tile_supported")):
        probe = getattr(torch.cpu, check, None)
        if probe is not None and probe():
            flags.add(flag)
    return frozenset(flags)
