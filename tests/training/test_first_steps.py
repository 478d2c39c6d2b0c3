"""The first step of Adam is as large at every rank with the scale lora_alpha / r, and grows with the root of the rank with rsLoRA's."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn

from veneer.adapters import LoRA, attach

DRAWS, WIDE, OUT = 60, 48, 24


def first_step(rank: int, rslora: bool) -> float:
    """Mean over draws of A of <dW, -G>: the size of the first update along the negative gradient of the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, OUT, bias=False))
    x, direction = torch.randn(32, WIDE), torch.randn(32, OUT)
    gradient = direction.T @ x
    bank = attach(model)
    sizes = []
    for seed in range(DRAWS):
        adapter = bank.add("a", LoRA(r=rank, lora_alpha=8, use_rslora=rslora, target_modules=("0",)), seed=seed)
        optimizer = torch.optim.Adam(bank.parameters("a"), lr=1e-3)
        with bank.use("a"):
            (model(x) * direction).sum().backward()
        optimizer.step()
        sizes.append(-float((adapter.delta_2d("0").detach() * gradient).sum()))
        bank.remove("a")
    return statistics.fmean(sizes)


@pytest.mark.parametrize("rank", [4, 16])
def test_the_first_step_does_not_depend_on_the_rank(rank: int) -> None:
    """Within the spread of 60 draws; rsLoRA's scale makes it larger, so a scale by another power of the rank would be seen."""
    one = first_step(1, rslora=False)
    assert one > 0 and first_step(rank, rslora=False) == pytest.approx(one, rel=0.1)
    assert first_step(rank, rslora=True) == pytest.approx(one * rank**0.5, rel=0.1)
