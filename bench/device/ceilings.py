"""The card's own rates: copying memory, and the product of two large matrices in bf16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.device.clock import seconds
from bench.device.supervise import Row, Setting, figure

PRODUCT = "product in bf16"


def run(setting: Setting) -> Iterator[Row]:
    """Both rates."""
    device = torch.device(setting.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    yield figure("device", name, torch=torch.__version__, cuda=torch.version.cuda)
    numbers = 2**20 if setting.tiny else 2**31
    source = torch.zeros(numbers, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    took = seconds(lambda: target.copy_(source), device, rounds=3 if setting.tiny else 10)
    yield figure("copying", round(2 * 2 * numbers / took / 1e12, 4), "TB/s")
    size = 128 if setting.tiny else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    took = seconds(lambda: a @ b, device, rounds=3 if setting.tiny else 20, warm=2)
    yield figure(PRODUCT, round(2 * size**3 / took / 1e12, 4), "TFLOP/s")


def measured_rate(setting: Setting) -> float | None:
    """The rate of the product in FLOP/s, if it was measured."""
    rows = setting.result_of("ceilings").get("rows", ())
    return next((row["value"] * 1e12 for row in rows if row["what"] == PRODUCT), None)
