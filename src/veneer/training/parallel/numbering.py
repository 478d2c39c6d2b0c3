"""The number of each piece in the dropout streams of its adapters, for a process that computes only some of the pieces.

A stream is keyed by the number of the training pass. Alone, a process counts its passes; among several, each must give a piece the number
that it would have had if all pieces had been computed one after the other here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.adapters.runtime.route import Route
from veneer.training.loop.pieces import Piece
from veneer.training.loop.step import Stepper


class Numbering:
    """The numbers of a round's pieces."""

    def __init__(self, stepper: Stepper, pieces: Sequence[Piece[Any]]) -> None:
        """``pieces``: of all jobs and processes, in order."""
        self._bank = stepper.bank
        self._next = {name: self._bank[name].draws for name in self._bank}
        self._numbers: dict[int, dict[str, int]] = {}
        for piece in pieces:
            name = piece.job.name
            used = Route.parse(stepper.routes.get(name, name)).names
            drawn = [one for one in used if self._bank[one].method.dropout]
            self._numbers[id(piece)] = {one: self._next[one] for one in drawn}
            for one in drawn:
                self._next[one] += 1

    def set(self, pieces: Sequence[Piece[Any]]) -> None:
        """Let the next pass, of these pieces, draw the masks of their numbers."""
        for piece in reversed(pieces):
            for name, number in self._numbers[id(piece)].items():
                self._bank[name].draws = number

    def end(self) -> None:
        """The round is over: all pieces have been drawn, here or elsewhere."""
        for name, number in self._next.items():
            self._bank[name].draws = number
