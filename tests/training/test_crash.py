"""Killed at any moment and started again by the same call, a run ends with the bits of the run that was never killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.training.killing import Killer, litter
from tests.training.made import digest, four_jobs, options

from veneer.models.load import Base

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
def killer(base: Base) -> Killer:
    """Kills of runs on one base."""
    return Killer(base)


@pytest.fixture(scope="module")
def short(killer: Killer, place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run with three commits, and in ``never`` a run of them that was never killed."""
    chosen = options(place, tmp_path_factory.mktemp("short") / "never", name="one", steps=5, save_every=2)
    assert killer.run(chosen)[0] == 0
    return chosen


def setting(place: Path, out: Path, jobs: str) -> dict[str, Any]:
    """A run with dropout and a checkpoint every five steps: one LoRA job, or four that are mixed."""
    chosen = options(place, out, lora_dropout=0.2)
    return {**chosen, "name": "one"} if jobs == "one" else {**chosen, "jobs": four_jobs()}


def torture(killer: Killer, place: Path, folder: Path, jobs: str, kills: int) -> tuple[int, int]:
    """Kill so many runs at random times; returns how many kills there were and how many came before the end."""
    code, seconds = killer.run(setting(place, folder / "never", jobs))
    assert code == 0
    expected = digest(folder / "never")
    killer.kills = killer.landed = 0
    for number in range(kills):
        out = folder / f"{jobs}-{number}"
        killer.to_the_end(setting(place, out, jobs), seconds)
        assert digest(out) == expected, number
        assert litter(out) == [], number
        shutil.rmtree(out)
    return killer.kills, killer.landed


@pytest.mark.parametrize("jobs", ["one", "four"])
def test_a_few_kills(killer: Killer, place: Path, tmp_path: Path, jobs: str) -> None:
    """SIGKILL at random times, the resumed run killed again with p = 0.3: adapters, optimizer, figures are bitwise the same."""
    assert torture(killer, place, tmp_path, jobs, 3)[1]


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
def test_death_at_every_named_point(killer: Killer, short: dict[str, Any], tmp_path: Path, point: str) -> None:
    """An exception and a kill at each point of the commit protocol, at its second commit: the next call ends the run as ever."""
    expected = digest(short["out"])
    for how, code in (("raise", 3), ("kill", -9)):
        chosen = {**short, "out": tmp_path / how}
        assert killer.run(chosen, point=point, time=2, how=how)[0] == code
        assert killer.run(chosen)[0] == 0
        assert digest(tmp_path / how) == expected
        assert litter(tmp_path / how) == []
