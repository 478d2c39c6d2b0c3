"""Sizes and forms that are chosen by measurement: the chunk of the loss, and the low-rank products of many adapters."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

import torch

from bench.device.clock import in_turn, seconds
from bench.device.shapes import dtype_of, made
from bench.device.supervise import Row, Setting, figure
from veneer.kernels import cross_entropy
from veneer.training.planning.gpu_forms import BaseSizes, ManyAdapters, choose_forms


def run(setting: Setting) -> Iterator[Row]:
    """The sweeps, and the choice that a run makes."""
    yield from _chunks(setting)
    yield from _products(setting)
    yield from _chosen(setting)


def _chunks(setting: Setting) -> Iterator[Row]:
    """The loss of 4,096 trained tokens on a vocabulary of 151,936, by the size of its chunks."""
    device, dtype = torch.device(setting.device), dtype_of(setting)
    tokens, width, words = (16, 16, 100) if setting.tiny else (4096, 2048, 151_936)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    head = torch.randn(words, width, device=device, dtype=dtype)
    targets, weights = torch.randint(words, (tokens,), device=device), torch.ones(tokens, device=device)
    usual = cross_entropy._chunk_bytes
    try:
        for size in (2**12, 2**14) if setting.tiny else (2**26, 2**28, 2**29, 2**30, 2**31):
            cross_entropy._chunk_bytes = lambda device, size=size: size  # type: ignore[misc]

            def step() -> None:
                total, _ = cross_entropy.linear_cross_entropy(hidden, head, None, targets, weights, all_count=True)
                torch.autograd.grad(total, hidden)

            took = seconds(step, device, rounds=2 if setting.tiny else 8)
            yield figure(f"loss in chunks of {size / 2**20:g} MiB", round(1e3 * took, 3), "ms")
    finally:
        cross_entropy._chunk_bytes = usual


def _products(setting: Setting) -> Iterator[Row]:
    """A layer with many adapters, forward and backward: one branch for each adapter, and one for all."""
    for adapters in (2,) if setting.tiny else (8, 32):
        for each in (4,) if setting.tiny else (64, 256, 1024):
            trial = ManyAdapters(_sizes(setting), adapters=adapters, each=each)
            works = {"one by one": trial.one_by_one, "at once": trial.at_once}
            took = in_turn(works, torch.device(setting.device), rounds=2 if setting.tiny else 10)
            ratio = round(took["one by one"] / took["at once"], 3)
            title = f"{adapters} adapters of {each} tokens, one by one over at once"
            yield figure(title, ratio, "x", ms={name: round(1e3 * value, 3) for name, value in took.items()})


def _sizes(setting: Setting) -> BaseSizes:
    """Qwen3-1.7B's, or the smallest."""
    dtype, device = dtype_of(setting), torch.device(setting.device)
    if setting.tiny:
        return BaseSizes(32, 64, 4, 2, 8, dtype, device)
    return BaseSizes(2048, 6144, 16, 8, 128, dtype, device)


def _chosen(setting: Setting) -> Iterator[Row]:
    """The forms that a run would choose on this device, and the time that choosing takes."""
    model = made("qwen", setting)
    began = time.perf_counter()
    found = choose_forms(model, tokens=1024, steps=10_000, option="auto")
    took = round(time.perf_counter() - began, 2)
    for name, value in asdict(found).items():
        yield figure(f"chosen: {name}", str(value), "", seconds=took)
