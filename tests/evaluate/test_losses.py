"""Held-out losses and their paired comparison."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny import tiny

from veneer.adapters import LoRA, attach
from veneer.data.example import Example
from veneer.errors import DataError
from veneer.evaluate.losses import Losses, compare, example_losses, t95
from veneer.models.flat import FlatRunner


def examples(count: int = 9) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        length = int(torch.randint(2, 12, (1,), generator=generator))
        ids = tuple(torch.randint(0, 100, (length,), generator=generator).tolist())
        weights = (0.0, *(float(t % 2 == 0) or 0.5 for t in range(1, length)))
        found.append(Example(ids, weights, f"row:{i}"))
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_losses_equal_those_of_each_example_alone(arch: str) -> None:
    """Grouping examples into flat (or padded) passes changes no example's loss."""
    model = tiny(arch)
    rows = examples()
    found = example_losses(FlatRunner(model), rows, tokens_per_pass=24)
    for i, row in enumerate(rows):
        ids = torch.tensor([row.ids])
        logp = model(input_ids=ids).logits[0].detach().double().log_softmax(-1)
        expected = -sum(w * float(logp[t, row.ids[t + 1]]) for t, w in enumerate(row.weights[1:]))
        assert math.isclose(float(found.sums[i]), expected, rel_tol=1e-4)
        assert float(found.weights[i]) == sum(row.weights)


def test_a_route_changes_the_losses_and_none_does_not() -> None:
    """The base's losses are the same with and without a bank; an adapter's are its own."""
    model = tiny("llama")
    runner, rows = FlatRunner(model), examples()
    base = example_losses(runner, rows)
    bank = attach(model)
    bank.add("a", LoRA(r=4))
    for parameter in bank.parameters("a"):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(example_losses(runner, rows, bank=bank).sums, base.sums)
    assert not torch.allclose(example_losses(runner, rows, bank=bank, route="a").sums, base.sums)


def test_examples_without_weight_count_nothing() -> None:
    """An example without a weighted token has loss and weight zero; a set of only such is refused."""
    runner = FlatRunner(tiny("llama"))
    silent = Example((1, 2, 3), (0.0, 0.0, 0.0), "row:x")
    found = example_losses(runner, [silent, *examples(2)])
    assert found.sums[0] == 0 and found.weights[0] == 0
    with pytest.raises(DataError, match="none of the held-out examples"):
        example_losses(runner, [silent])


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Over 2,000 drawn sets of unequal examples the 95 % interval holds the true difference in 93 to 97 % of them."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(2000):
        weights = torch.randint(1, 30, (60,), generator=generator).double()
        hard = torch.rand(60, generator=generator).double() * 5
        gap = 0.3 + 0.5 * torch.randn(60, generator=generator, dtype=torch.float64)
        apart = compare(Losses(weights * (hard + gap), weights), Losses(weights * hard, weights))
        hits += apart.low <= 0.3 <= apart.high
    assert 0.93 < hits / 2000 < 0.97


def test_comparison_needs_the_same_examples() -> None:
    """Losses over other weights cannot be compared; one example alone has an unbounded interval."""
    one = Losses(torch.tensor([1.0]).double(), torch.tensor([2.0]).double())
    with pytest.raises(DataError, match="same examples"):
        compare(one, Losses(one.sums, one.weights + 1))
    assert compare(one, one).low == -math.inf


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (3, 3.182), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_quantiles_of_t(degrees: int, quantile: float) -> None:
    """The approximation is within 1 % of the tables."""
    assert math.isclose(t95(degrees), quantile, rel_tol=0.01)
