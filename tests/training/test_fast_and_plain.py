"""All fast forms together against none of them: twenty steps of training tell the same story."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.tiny import tiny
from tests.training.made import examples
from torch import nn

from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.kernels import cpp_library as native
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.flat import FlatRunner
from veneer.training.loop.step import Stepper

STEPS, ROWS = 20, 6
METHODS = {"lora": LoRA(r=4), "dora": DoRA(r=4)}
LIMITS = {("sgd", torch.float32): 1e-6, ("adamw", torch.float32): 1e-4, ("adamw", torch.bfloat16): 2e-2}


def prepared(arch: str, dtype: torch.dtype, method: str, optimizer: str) -> tuple[Bank, torch.optim.Optimizer]:
    bank = attach(tiny(arch).to(dtype))
    bank.add("a", METHODS[method], seed=1)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    # At twice this rate of SGD a random Gemma 3 magnifies rounding a hundredfold, in Python as in C++.
    return bank, kind(bank.parameters("a"), lr=5e-3, weight_decay=0.0)


def fast(bank: Bank, optimizer: torch.optim.Optimizer, rows: list[Example]) -> list[float]:
    """Flat batches, fused layers, own attention and loss, exchanged elementwise chains."""
    use_fast_forwards(bank.model)
    stepper = Stepper(FlatRunner(bank.model), bank)
    losses = []
    for _ in range(STEPS):
        share = stepper.forward_backward(make_batch(rows, "a"))["a"]
        for parameter in bank.parameters("a"):
            parameter.grad = None if parameter.grad is None else parameter.grad / share.weight
        optimizer.step()
        optimizer.zero_grad()
        losses.append(share.loss / share.weight)
    return losses


@functools.cache
def plain(arch: str, dtype: torch.dtype, method: str, optimizer_name: str) -> list[float]:
    """Padded rows through the model's own forward, logits of all tokens, the plain form of every layer."""
    bank, optimizer = prepared(arch, dtype, method, optimizer_name)
    rows = examples(ROWS, seed=3)
    bank.fast_path = False
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, weights = torch.zeros_like(ids), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row.ids), 1
        weights[i, : len(row)] = torch.tensor(row.weights)
    losses = []
    for _ in range(STEPS):
        with bank.use("a", training=True):
            logits = bank.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (each * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kernels", ["python", "C++"])
@pytest.mark.parametrize(("optimizer", "dtype"), LIMITS, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2", "bert"])
def test_twenty_steps_end_alike(
    arch: str,
    method: str,
    optimizer: str,
    dtype: torch.dtype,
    kernels: str,
    request: pytest.FixtureRequest,
) -> None:
    """Losses agree at every step, relative to their size, and they fall."""
    if kernels == "C++":
        request.getfixturevalue("native_kernels")
    ours = fast(*prepared(arch, dtype, method, optimizer), examples(ROWS, seed=3))
    native.use(None)
    theirs = plain(arch, dtype, method, optimizer)
    assert theirs[-1] < 0.98 * theirs[0], theirs
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    assert apart <= LIMITS[optimizer, dtype]
