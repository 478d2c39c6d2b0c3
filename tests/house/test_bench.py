"""The bench keeps step with the package: its cases name who is there, its listener hears all that a trainer tells."""

from __future__ import annotations

import pytest
from bench.cases import CASES, Case
from bench.workers.veneer import Listener

from veneer.train import trainer


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_claims_are_about_contestants(case: Case) -> None:
    """Names are given once, and every claim is about two contestants of its case."""
    names = [one.name for one in (*case.contestants, *case.extra)]
    assert len(names) == len(set(names))
    assert {name for claim in case.claims for name in (claim.over, claim.under)} <= set(names)


def test_the_listener_hears_everything() -> None:
    """A method that the trainer calls and the bench's listener lacks would end a measurement half way."""
    asked = {name for name in vars(trainer.Listener) if not name.startswith("_")}
    assert asked <= set(dir(Listener))
