"""The benchmark's cases are consistent."""

from __future__ import annotations

import pytest
from bench.cases import CASES, Case


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_claims_are_about_contestants(case: Case) -> None:
    """Names within a case are unique, and every claim is about two of its contestants."""
    names = [one.name for one in (*case.contestants, *case.extra)]
    assert len(names) == len(set(names))
    assert {name for claim in case.claims for name in (claim.over, claim.under)} <= set(names)
