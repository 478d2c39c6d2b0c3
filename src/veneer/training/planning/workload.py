"""The passes of a run's first rounds, from the lengths of its examples alone.

The order of the data is a pure function, so the tokens and segment lengths of every pass are known before the run begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.data.batch import packed
from veneer.data.dataset import Examples, Subset
from veneer.data.example import Example
from veneer.training.loop.job import Job
from veneer.training.loop.pieces import Piece, passes

_PLANNED_EXAMPLES = 5_000
"""Examples whose position in the run is computed. Later rounds are assumed to be similar."""

JobExamples = list[tuple[Job, Example]]


@dataclass(frozen=True)
class PlannedExample:
    """An example at its position in a run: its job, index and length in tokens."""

    job: Job
    index: int
    tokens: int

    def __len__(self) -> int:
        return self.tokens


Pass = tuple[PlannedExample, ...]


def size(items: Sequence[Any]) -> int:
    """Total tokens of examples or planned examples."""
    return sum(map(len, items))


def planned_rounds(jobs: Sequence[Job], tokens_per_pass: int, tokens_per_shared_pass: int) -> list[list[Pass]]:
    """The passes of each of the first rounds of a run, or of all rounds of a short one."""
    lengths = {id(job.examples): lengths_of(job.examples) for job in jobs}
    most = max(3, _PLANNED_EXAMPLES // sum(job.options.batch_size for job in jobs))
    rounds = []
    for number in range(min(most, max(job.steps for job in jobs))):
        pieces = []
        for job in (job for job in jobs if number < job.steps):
            first = job.progress.cursor + number * job.options.batch_size
            indices = [job.order.at(first + i) for i in range(job.options.batch_size)]
            planned = [PlannedExample(job, index, lengths[id(job.examples)][index]) for index in indices]
            pieces += [Piece(job, tuple(piece)) for piece in packed(planned, tokens_per_pass)]
        groups = passes(pieces, tokens_per_shared_pass)
        rounds.append([tuple(example for piece in group for example in piece.examples) for group in groups])
    return rounds


def largest_pass(rounds: Sequence[Sequence[Pass]]) -> Pass:
    """The pass that needs the most memory: the one with the most tokens, then with the longest segments."""
    return max((one for found in rounds for one in found), key=lambda one: (size(one), sum(len(e) ** 2 for e in one)))


def tokens_per_round(job: Job) -> float:
    """Expected tokens of one step of a job."""
    return job.options.batch_size * sum(lengths_of(job.examples)) / max(1, len(job.examples))


def examples_of(planned: Pass) -> JobExamples:
    """(job, example) of each example of a pass."""
    return [(one.job, one.job.examples[one.index]) for one in planned]


def smaller(rows: JobExamples, tokens: int) -> JobExamples:
    """About ``tokens`` tokens of a pass: evenly chosen rows, the last of them cut; the whole pass if it is not larger."""
    total = sum(len(example) for _, example in rows)
    if total <= tokens:
        return rows
    chosen: JobExamples = []
    left = tokens
    for job, example in rows[:: max(1, total // max(1, tokens))]:
        if left < 2:
            break
        chosen.append((job, example if len(example) <= left else _end(example, left)))
        left -= len(chosen[-1][1])
    return chosen


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """The lengths of examples, without rendering them where that is possible."""
    return examples.lengths if isinstance(examples, (Examples, Subset)) else [len(example) for example in examples]


def _end(example: Example, tokens: int) -> Example:
    """The end of an example, where its answer is; all tokens count if none of the answer is left. The beginning of one with labels."""
    if example.labels:
        ids, weights, labels = example.ids[:tokens], example.weights[:tokens], example.labels[:tokens]
        return Example(ids, weights if any(weights) else (1.0, *weights[1:]), example.source, (), labels)
    if example.lengths:
        return Example.of_sequences([_end(one, max(2, tokens // 2)) for one in example.sequences])
    if len(example) <= tokens:
        return example
    weights = (0.0, *example.weights[-tokens:][1:])
    if not any(weights):
        weights = (0.0, *[1.0] * (tokens - 1))
    return Example(example.ids[-tokens:], weights, example.source)
