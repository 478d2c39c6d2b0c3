"""Sizes and forms that are chosen by measurement: the chunk of the loss, and the low-rank products of many adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bench.device.clock import in_turn, seconds
from bench.device.shapes import dtype_of
from bench.device.supervise import Row, Setting, figure
from veneer.kernels import cross_entropy
from veneer.kernels.lora.branch import Branch, Factors
from veneer.kernels.lora.grouped import GroupedBranch, TokenGrid, pad_factors
from veneer.kernels.lora.linear import adapted_linear
from veneer.kernels.lora.single import SingleBranch


def run(setting: Setting) -> Iterator[Row]:
    """Both sweeps."""
    yield from _chunks(setting)
    yield from _products(setting)


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
        for each in (4,) if setting.tiny else (16, 64, 256):
            layer = _Layer(setting, adapters, each)
            forms = {"one by one": layer.one_by_one, "at once": layer.at_once}
            took = in_turn(forms, torch.device(setting.device), rounds=2 if setting.tiny else 10)
            ratio = round(took["one by one"] / took["at once"], 3)
            title = f"{adapters} adapters of {each} tokens, one by one over at once"
            yield figure(title, ratio, "x", ms={name: round(1e3 * value, 3) for name, value in took.items()})


class _Layer:
    """A linear layer with adapters of ``each`` tokens, and their products forward and backward."""

    def __init__(self, setting: Setting, adapters: int, each: int) -> None:
        device, dtype, width = torch.device(setting.device), dtype_of(setting), 32 if setting.tiny else 2048
        self.layers = [(torch.randn(width, width, device=device, dtype=dtype) / width**0.5, None)]
        self.factors = [[self._factors(width, device)] for _ in range(adapters)]
        self.x = torch.randn(adapters * each, width, device=device, dtype=dtype, requires_grad=True)
        self.spans = [slice(each * j, each * (j + 1)) for j in range(adapters)]
        self.grid = TokenGrid([torch.arange(one.start, one.stop) for one in self.spans], [1.0] * adapters, device)

    def _factors(self, width: int, device: torch.device) -> Factors:
        a, b = (torch.randn(*size, device=device, requires_grad=True) for size in ((16, width), (width, 16)))
        return Factors(a, b, 2.0)

    def _backward(self, branches: Sequence[Branch]) -> None:
        adapted_linear(self.x, self.layers, branches)[0].square().sum().backward()

    def one_by_one(self) -> None:
        """A branch for each adapter."""
        self._backward([SingleBranch(span, 1.0, own) for span, own in zip(self.spans, self.factors, strict=True)])

    def at_once(self) -> None:
        """One branch for all of them."""
        self._backward([GroupedBranch(self.grid, self.factors, pad_factors(self.factors, self.layers, self.grid))])
