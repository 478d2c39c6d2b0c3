"""The benchmark's cases are consistent."""

from __future__ import annotations

import importlib

import pytest
from bench.cases import CASES, Case
from tests.project.source import ROOT, modules


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_claims_are_about_contestants(case: Case) -> None:
    """Names within a case are unique, and every claim is about two of its contestants."""
    names = [one.name for one in (*case.contestants, *case.extra)]
    assert len(names) == len(set(names))
    assert {name for claim in case.claims for name in (claim.over, claim.under)} <= set(names)


def test_every_part_imports() -> None:
    """Every module of the benchmark that needs no peer imports, so that its names of the package are current."""
    parts = [path for path in modules(ROOT / "bench") if not path.stem.startswith("peer_") and path.stem != "trl"]
    assert len(parts) > 15
    for path in parts:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
