"""Killed at any moment and started again by the same call, a run ends with the bits of the run that was never killed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.training.killing import Killer, litter
from tests.training.made import digest, four_jobs, options

POINTS = (
    "made aside",
    "files written",
    "manifest written",
    "renamed",
    "committed",
    "verified",
    "pointed to",
    "pruned",
)


@pytest.fixture(scope="module")
def killer(place: Path) -> Iterator[Killer]:
    """One warm process for all kills."""
    found = Killer(place)
    yield found
    found.close()


def setting(place: Path, out: Path, jobs: str) -> dict[str, Any]:
    """A run with dropout and a checkpoint every five steps: one LoRA job, or four that are mixed."""
    chosen = options(place, out, name="one", steps=20, lora_dropout=0.2)
    if jobs == "one":
        return chosen
    return {**chosen, "name": None, "steps": 12, "jobs": four_jobs()}


def torture(killer: Killer, place: Path, folder: Path, jobs: str, kills: int) -> tuple[int, int]:
    """Kill so many runs at random times; returns how many kills there were and how many came before the end."""
    never = setting(place, folder / "never", jobs)
    times = []
    for _ in range(3):
        shutil.rmtree(folder / "never", ignore_errors=True)
        code, seconds = killer.run(never)
        assert code == 0
        times.append(seconds)
    expected = digest(folder / "never")
    killer.kills = killer.landed = 0
    for number in range(kills):
        out = folder / f"{jobs}-{number}"
        killer.to_the_end(setting(place, out, jobs), min(times))
        assert digest(out) == expected, number
        assert litter(out) == [], number
        shutil.rmtree(out)
    return killer.kills, killer.landed


@pytest.mark.parametrize("jobs", ["one", "four"])
def test_a_dozen_kills(killer: Killer, place: Path, tmp_path: Path, jobs: str) -> None:
    """SIGKILL at random times, the resumed run killed again with p = 0.3: adapters, optimizer, figures are bitwise the same."""
    kills, landed = torture(killer, place, tmp_path, jobs, 12)
    assert landed >= 0.45 * kills


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("jobs", ["one", "four"])
def test_two_hundred_kills(killer: Killer, place: Path, tmp_path: Path, jobs: str, part: int) -> None:
    """The same 200 times, in four parts."""
    killer.rng.seed(1000 + part)
    kills, landed = torture(killer, place, tmp_path, jobs, 50)
    print(
        f"{jobs}, part {part}: {landed} of {kills} kills came before the end; all ended with the bits of the run never killed"
    )
    assert landed >= 0.45 * kills


@pytest.mark.parametrize("point", POINTS)
def test_death_at_every_named_point(killer: Killer, place: Path, tmp_path: Path, point: str) -> None:
    """An exception, an exit and a kill at each point of the commit protocol, at its second commit: the next call ends the run as ever."""
    short = {"steps": 5, "save_every": 2, "name": "one"}
    killer.run(options(place, tmp_path / "never", **short))
    expected = digest(tmp_path / "never")
    for how, code in (("raise", 3), ("exit", 9), ("kill", -9)):
        chosen = options(place, tmp_path / how, **short)
        assert killer.run(chosen, point=point, time=2, how=how)[0] == code
        assert killer.run(chosen)[0] == 0
        assert digest(tmp_path / how) == expected
        assert litter(tmp_path / how) == []
