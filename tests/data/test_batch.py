"""Examples, flat batches, the order of the data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.batch import IGNORE, Order, make_batch
from veneer.data.example import Example
from veneer.errors import DataError

A = Example((5, 6, 7), (0.0, 0.0, 1.0), "rows.jsonl:1")
B = Example((8, 9), (0.0, 0.5), "rows.jsonl:2")


def test_a_batch_lays_segments_behind_each_other() -> None:
    """Targets and weights belong to the next token, stay inside the segment, and end with nothing to predict."""
    batch = make_batch([A, B], ["a", "b"])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.offsets.tolist() == [0, 3, 5]
    assert batch.targets.tolist() == [6, 7, IGNORE, 9, IGNORE]
    assert batch.weights.tolist() == [0.0, 1.0, 0.0, 0.5, 0.0]
    assert batch.jobs == ("a", "b") and batch.sources == ("rows.jsonl:1", "rows.jsonl:2")
    assert (batch.ids.dtype, batch.weights.dtype, batch.offsets.dtype) == (torch.long, torch.float32, torch.long)
    assert (batch.tokens, batch.trained) == (5, 2)
    assert batch.to("cpu").targets.tolist() == batch.targets.tolist()


def test_one_job_for_all() -> None:
    """A single job name stands for every segment."""
    assert make_batch([A, B], "style").jobs == ("style", "style")


@pytest.mark.parametrize(
    ("ids", "weights", "words"),
    [
        ((), (), "at least one token"),
        ((1, 2), (0.0,), "one weight per token"),
        ((1, 2), (1.0, 1.0), "nothing predicts it"),
        ((1, 2), (0.0, float("nan")), "finite"),
        ((1, 2), (0.0, -1.0), "not negative"),
    ],
)
def test_an_example_that_cannot_be_trained_is_refused(
    ids: tuple[int, ...], weights: tuple[float, ...], words: str
) -> None:
    """Ids and weights that do not belong together are an error that names the place."""
    with pytest.raises(DataError, match=rf"rows\.jsonl:9.*{words}"):
        Example(ids, weights, "rows.jsonl:9")


def test_a_batch_needs_examples_and_as_many_jobs() -> None:
    """No example, or another number of jobs, is an error."""
    with pytest.raises(DataError, match="at least one example"):
        make_batch([], "a")
    with pytest.raises(DataError, match="2 examples and 1 jobs"):
        make_batch([A, B], ["a"])


@given(n=st.integers(1, 300), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    """Every example stands once in every epoch, whatever the size, seed and epoch."""
    order = Order(n, seed)
    assert sorted(order.index(epoch, i) for i in range(n)) == list(range(n))


def test_the_order_is_a_pure_function() -> None:
    """The same (seed, epoch, index) gives the same example from any object, in any order of asking."""
    one, other = Order(1000, 7), Order(1000, 7)
    asked = [(e, i) for e in (3, 0, 2) for i in (999, 0, 500)]
    assert [one.index(e, i) for e, i in asked] == [other.index(e, i) for e, i in reversed(asked)][::-1]
    assert [one.at(3 * 1000 + i) for i in range(5)] == [one.index(3, i) for i in range(5)]


def test_orders_differ_between_seeds_and_epochs() -> None:
    """Another seed or epoch is another permutation, and neighbours do not stay neighbours."""
    n = 4096
    orders = [[Order(n, seed).index(epoch, i) for i in range(n)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = sum(x == y for x, y in zip(orders[a], orders[b], strict=True))
        assert same < 12  # one match is expected by chance
    steps = sum(abs(a - b) == 1 for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert steps < 20  # two are expected by chance


def test_small_permutations_are_about_equally_likely() -> None:
    """Over seeds and epochs each of the 24 orders of four examples comes up about as often."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(200):
        order = Order(4, seed)
        for epoch in range(24):
            key = tuple(order.index(epoch, i) for i in range(4))
            counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24 and min(counts.values()) > 140 and max(counts.values()) < 260


def test_without_shuffling_the_file_s_order_is_kept() -> None:
    """``shuffle=False`` reads the examples as they stand."""
    assert [Order(5, 3, shuffle=False).at(i) for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]


def test_an_order_has_edges() -> None:
    """No examples, and places outside, are errors."""
    with pytest.raises(DataError, match="at least one"):
        Order(0)
    with pytest.raises(IndexError):
        Order(3).index(0, 3)
