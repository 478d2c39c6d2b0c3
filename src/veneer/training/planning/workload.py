"""What a run will ask of the machine, from its examples' lengths alone: every pass of its first rounds, and the largest one.

The order of the data is a pure function, so the passes of a run are known before it begins: how many tokens each holds, and how long
their segments are. Nothing is rendered or computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from veneer.data.dataset import Examples, Selected
from veneer.data.example import Example
from veneer.training.loop.job import Job
from veneer.training.loop.trainer import Piece, cut, passes

_LOOKED_AT = 5_000
"""Examples whose place in the run is computed; later rounds are taken to be like these."""

Rows = list[tuple[Job, Example]]


@dataclass(frozen=True)
class Slot:
    """An example that stands at some place in a run: whose it is, its number and its length in tokens."""

    job: Job
    index: int
    tokens: int

    def __len__(self) -> int:
        return self.tokens


Pass = tuple[Slot, ...]


def size(slots: Sequence[Any]) -> int:
    """Tokens of a pass, or of examples."""
    return sum(map(len, slots))


def rounds(jobs: Sequence[Job], budget: int, share: int) -> list[list[Pass]]:
    """The passes of the first rounds of a run, in their order: of all rounds where these are few.

    budget, share: as the trainer has them.
    """
    lengths = {id(job.examples): _lengths(job.examples) for job in jobs}
    most = max(3, _LOOKED_AT // sum(job.options.batch_size for job in jobs))
    found = []
    for number in range(min(most, max(job.steps for job in jobs))):
        pieces = []
        for job in jobs:
            if number < job.steps:
                first = job.progress.cursor + number * job.options.batch_size
                indices = [job.order.at(first + i) for i in range(job.options.batch_size)]
                slots = [Slot(job, index, lengths[id(job.examples)][index]) for index in indices]
                pieces += [Piece(job, cast(Any, piece)) for piece in cut(slots, budget)]
        groups = passes(pieces, share)
        found.append([tuple(cast(Slot, slot) for piece in group for slot in piece.examples) for group in groups])
    return found


def largest(found: Sequence[Sequence[Pass]]) -> Pass:
    """The pass that needs the most memory: the one with most tokens, and among those the one with the longest segments."""
    return max((one for passes in found for one in passes), key=lambda one: (size(one), sum(len(s) ** 2 for s in one)))


def tokens_of_run(jobs: Sequence[Job]) -> float:
    """Tokens that all steps of all jobs train on, in expectation."""
    return sum(job.steps * job.options.batch_size * _mean(_lengths(job.examples)) for job in jobs)


def tokens_of_round(jobs: Sequence[Job]) -> float:
    """Tokens of a round in which every job takes part, in expectation."""
    return sum(job.options.batch_size * _mean(_lengths(job.examples)) for job in jobs)


def longest(jobs: Sequence[Job]) -> int:
    """Tokens of the longest example of all jobs."""
    return max(length for job in jobs for length in _lengths(job.examples))


def rows(slots: Sequence[Slot]) -> Rows:
    """The examples of a pass."""
    return [(slot.job, slot.job.examples[slot.index]) for slot in slots]


def smaller(whole: Rows, tokens: int) -> Rows:
    """About so many tokens of a pass: some of its rows evenly, the last of them cut; a pass that is small enough as it is."""
    total = sum(len(example) for _, example in whole)
    if total <= tokens:
        return whole
    step = max(1, total // max(1, tokens))
    chosen: Rows = []
    left = tokens
    for job, example in whole[::step]:
        if left < 2:
            break
        chosen.append((job, example if len(example) <= left else _end(example, left)))
        left -= len(chosen[-1][1])
    return chosen


def _end(example: Example, tokens: int) -> Example:
    """The end of an example, where its answer is; all of it counts if none of the answer is left."""
    weights = (0.0, *example.weights[-tokens:][1:])
    if not any(weights):
        weights = (0.0, *[1.0] * (tokens - 1))
    return Example(example.ids[-tokens:], weights, example.source)


def _lengths(examples: Sequence[Example]) -> list[int]:
    if isinstance(examples, (Examples, Selected)):
        return examples.lengths
    return [len(example) for example in examples]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / max(1, len(values))
