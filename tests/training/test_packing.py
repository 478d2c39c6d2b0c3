"""How jobs share passes: measured before the first step, printed, written down, and kept when the run goes on."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.training.made import QUIET, World, digest, examples, four_jobs, options, values

from veneer.models.load import Base
from veneer.training import train
from veneer.training.planning import packing
from veneer.training.planning.packing import Packing, choose_packing
from veneer.training.run.console import Console

TWO = [{"name": "a"}, {"name": "b", "r": 1, "method": "dora"}]


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
    """Let a pass take ``seconds`` for each job that it holds: {jobs in the pass: seconds}."""

    def fake(stepper: Any, passes: Any) -> float:
        return sum(seconds[len({slot.job.name for slot in one})] for one in passes)

    monkeypatch.setattr(packing, "_seconds", fake)


def world_of(count: int, **others: Any) -> tuple[World, list[Any]]:
    world = World()
    plain = {"steps": 100, **others}
    rows = plain.pop("rows", None)
    return world, [world.job(f"j{i}", rows=rows or examples(9, seed=i), seed=i, **plain) for i in range(count)]


@pytest.mark.parametrize(
    ("seconds", "share", "says"),
    [
        ({1: 1.0, 4: 2.0}, 256, "measured: 2.00 times as fast as in turn"),
        ({1: 1.0, 4: 5.0}, 0, "measured: shared passes take 1.25 times as long"),
        ({1: 1.0, 4: 3.95}, 0, "measured"),
    ],
)
def test_the_quicker_way_is_taken(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], share: int, says: str
) -> None:
    """Sharing is taken where it is quicker by more than a hair."""
    world, jobs = world_of(4)
    timed(monkeypatch, seconds)
    found = choose_packing(jobs[0].options, world.stepper, jobs)
    assert found.tokens == share and says in found.reason
    assert set(found.seconds) == {"0", "256"}


def test_measuring_leaves_nothing_behind() -> None:
    """Tensors, gradients and dropout streams are as if nothing had run; the measured figures are there."""
    world, jobs = world_of(3)
    before = [values(world, job.name) for job in jobs]
    found = choose_packing(jobs[0].options, world.stepper, jobs)
    assert found.seconds and all(value > 0 for value in found.seconds.values())
    for job, tensors in zip(jobs, before, strict=True):
        assert all(a.equal(b) for a, b in zip(values(world, job.name), tensors, strict=True))
        assert all(p.grad is None for p in job.parameters) and world.bank[job.name].draws == 0


def test_what_is_asked_for_is_not_measured() -> None:
    """A size that is given is taken; one job shares with nobody; a short run is not worth measuring; long pieces cannot share."""
    world, jobs = world_of(2)
    asked = jobs[0].options.model_copy(update={"tokens_per_shared_pass": 64})
    assert choose_packing(asked, world.stepper, jobs) == Packing(64, "as requested")
    assert choose_packing(jobs[0].options, world.stepper, jobs[:1]).tokens == 0
    jobs[0].steps = jobs[1].steps = 5
    assert choose_packing(jobs[0].options, world.stepper, jobs).reason == "not measured"
    world, jobs = world_of(2, batch_size=1, rows=examples(3, shortest=700, longest=700))
    found = choose_packing(jobs[0].options, world.stepper, jobs)
    assert found.tokens == 0 and "no two of their pieces" in found.reason


def test_the_choice_is_printed_written_down_and_kept(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in run.json before the first step; a later start takes it, though measuring would now say otherwise."""
    timed(monkeypatch, {1: 1.0, 2: 1.0})
    out = tmp_path / "a"
    wanted = options(place, out, jobs=TWO, steps=45, plan=True)
    said = io.StringIO()

    class Halt(Console):
        def line(self, text: str) -> None:
            super().line(text)
            if "share passes" in text:
                assert json.loads((out / "run.json").read_text())["share"] == 256
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(wanted, base=base, console=Halt(said))
    assert (
        "share passes of up to 256 tokens; longer pieces run in turn (measured: 2.00 times as fast" in said.getvalue()
    )
    timed(monkeypatch, {1: 1.0, 2: 9.0})
    train(wanted, base=base, console=QUIET)
    facts = json.loads((out / "run.json").read_text())
    assert facts["share"] == 256 and facts["sharing"]["seconds"] == {"0": 2.0, "256": 1.0}
    train(wanted, base=base, console=Console(said := io.StringIO()))
    assert "share passes of up to 256 tokens" in said.getvalue()
    shutil.rmtree(out)
    train(wanted, base=base, console=QUIET)
    assert json.loads((out / "run.json").read_text())["share"] == 0


def test_another_way_of_sharing_is_another_run(place: Path, base: Base, tmp_path: Path) -> None:
    """The same jobs in turn and in shared passes are alike within rounding, and a run does not change its way on resume."""
    from veneer.errors import ConfigError

    jobs = four_jobs()
    train(options(place, tmp_path / "a", jobs=jobs, tokens_per_shared_pass=0), base=base, console=QUIET)
    train(options(place, tmp_path / "b", jobs=jobs, tokens_per_shared_pass=512), base=base, console=QUIET)
    assert digest(tmp_path / "a").keys() == digest(tmp_path / "b").keys()
    with pytest.raises(ConfigError, match="tokens_per_shared_pass: 0 in the folder, 512 now"):
        train(options(place, tmp_path / "a", jobs=jobs, tokens_per_shared_pass=512), base=base, console=QUIET)
