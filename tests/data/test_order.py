"""The order of the data: a permutation for each epoch, as a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.order import Order
from veneer.errors import DataError


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
