"""The exception tree and the collection of problems."""

from __future__ import annotations

import inspect

import pytest

from veneer import errors
from veneer.errors import ConfigError, DataError, Problems, VeneerError

CHILDREN = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, VeneerError) and value is not VeneerError
]


@pytest.mark.parametrize("child", CHILDREN, ids=lambda c: c.__name__)
def test_every_error_is_a_built_in_error_too(child: type[VeneerError]) -> None:
    """Each error derives from VeneerError and from ValueError or RuntimeError, and is in the tree of the docstring."""
    assert issubclass(child, ValueError) != issubclass(child, RuntimeError)
    built_in = "ValueError" if issubclass(child, ValueError) else "RuntimeError"
    line = next(line for line in (errors.__doc__ or "").splitlines() if f"── {child.__name__} " in line)
    assert built_in in line.split()
    assert child.__name__ in errors.__all__


def test_only_wrong_usage_exits_with_two() -> None:
    """The exit code is 2 for options and 1 for everything else."""
    assert {child.__name__: child.exit_code for child in CHILDREN if child.exit_code != 1} == {"ConfigError": 2}
    assert VeneerError.exit_code == 1
    assert ConfigError("x").exit_code == 2


def test_no_problem_does_not_raise() -> None:
    """An empty collection raises nothing."""
    Problems().raise_if_any(DataError, "rows.jsonl")


def test_one_problem_is_one_line() -> None:
    """A single problem is on the headline's line."""
    problems = Problems()
    problems.add("line 3: no answer")
    with pytest.raises(DataError) as caught:
        problems.raise_if_any(DataError, "rows.jsonl cannot be used")
    assert str(caught.value) == "rows.jsonl cannot be used: line 3: no answer"


def test_all_problems_are_listed_in_order() -> None:
    """Several problems are listed one per line, in order; those beyond the limit are counted."""
    problems = Problems()
    for number in range(7):
        problems.add(f"line {number}")
    assert len(problems) == 7 and list(problems) == [f"line {number}" for number in range(7)]
    with pytest.raises(DataError) as caught:
        problems.raise_if_any(DataError, "rows.jsonl", limit=5)
    assert str(caught.value).splitlines() == [
        "rows.jsonl: 7 problems",
        *[f"  - line {number}" for number in range(5)],
        "  and 2 more",
    ]
