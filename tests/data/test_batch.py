"""Examples, flat batches, the order of the data."""

from __future__ import annotations

import pytest
import torch

from veneer.data.batch import IGNORE, make_batch
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
    assert batch.tokens == 5


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
