"""Pieces of the jobs' steps, and the passes through the base that pieces share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Generic, TypeVar

from veneer.training.loop.job import Job

S = TypeVar("S", bound=Sized)


@dataclass(frozen=True)
class Piece(Generic[S]):
    """Consecutive examples of a job's step that go through the base together."""

    job: Job
    examples: tuple[S, ...]
    number: int = 0
    """Position among the pieces of the step."""

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(map(len, self.examples))


def passes(pieces: Sequence[Piece[S]], most: int) -> Iterator[list[Piece[S]]]:
    """Group consecutive pieces of different jobs into passes of at most ``most`` tokens."""
    group: list[Piece[S]] = []
    used = 0
    for piece in pieces:
        if group and (used + piece.tokens > most or group[-1].job is piece.job):
            yield group
            group, used = [], 0
        group.append(piece)
        used += piece.tokens
    if group:
        yield group
