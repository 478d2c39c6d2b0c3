"""Times and memory on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def wait(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, *, rounds: int, warm: int = 1) -> float:
    """The median time of ``work`` over so many rounds, after ``warm`` ones that are not counted."""
    found = []
    for number in range(warm + rounds):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        if number >= warm:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def in_turn(works: dict[str, Callable[[], object]], device: torch.device, *, rounds: int) -> dict[str, float]:
    """The median time of each, taken in turn, so that a change of the machine's speed meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(seconds(work, device, rounds=1, warm=0))
    return {name: statistics.median(times) for name, times in found.items()}


def forget_peak(device: torch.device) -> None:
    """Measure the peak of memory from here on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float | None:
    """The peak of the device's memory in GB; None on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None
