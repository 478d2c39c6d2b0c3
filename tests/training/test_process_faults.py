"""Several processes when one has nothing to do, computes a NaN, cannot write or is killed, and a run that goes on with another number."""

from __future__ import annotations

import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints.helpers import newest
from tests.tiny import tiny, tiny_tokenizer
from tests.training.killing import litter
from tests.training.made import QUIET, Ear, World, digest, examples, figures, four_jobs, options
from tests.training.processes import Forks, together
from tests.training.test_sequences import SIZES
from tests.training.test_sharding import run_together, world_in_parts

from veneer.training import train
from veneer.training.loop.job import Job
from veneer.training.parallel.processes import Processes
from veneer.training.run.console import Console
from veneer.training.shared_base import Watcher


@pytest.fixture
def wanted(place: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of four jobs, whose steps have several pieces, on a base with four heads."""
    tiny("llama", **SIZES).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    more = {"tokens_per_pass": 60, "valid": (place / "valid.jsonl",), "eval_every": 4, "steps": 8, "save_every": 3}
    own = {"base": str(tmp_path / "base"), "device": "cpu"}
    return {**options(place, tmp_path / "run", jobs=four_jobs(), batch_size=4), **more, **own}


def test_an_empty_share_and_a_nan_in_a_divided_base() -> None:
    """A process without pieces runs as many passes as the others; a NaN in one process ends its job in all, and no other."""

    def work(processes: Processes) -> dict[str, Any]:
        def make(world: World) -> list[Job]:
            rows, names = examples(4, longest=6), ("good", "nan")
            return [world.job(name, rows=rows, seed=seed, steps=4, batch_size=2) for seed, name in enumerate(names)]

        ear = Ear()
        world, jobs = world_in_parts(processes, make)
        forward = world.stepper.forward_backward

        def broken(batch: Any, **rest: Any) -> Any:
            if "nan" in batch.jobs and jobs[1].progress.step == 2:
                with torch.no_grad():
                    jobs[1].parameters[0].fill_(float("nan"))
            return forward(batch, **rest)

        world.stepper.forward_backward = broken  # type: ignore[method-assign]
        trainer = world.trainer(jobs, ear, share=0)
        trainer.processes = processes
        trainer.run()
        return {"ends": ear.ends, "steps": [job.progress.step for job in jobs]}

    found = together(3, work)
    assert all(one == {"ends": {"good": "finished", "nan": "non_finite"}, "steps": [4, 2]} for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_the_first_process_can_write_no_more(wanted: dict[str, Any], tmp_path: Path, shard: str) -> None:
    """A limit on the size of files stands for a full disk: the run trains to its end, all processes end with one sentence, and the same
    command ends it with the bits of a run that never met the limit."""
    wanted["shard"] = shard

    def limited(rank: int) -> list[str]:
        said: list[str] = []
        shown = Console(quiet=True)
        shown.line = said.append  # type: ignore[method-assign]
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
        train(wanted, console=shown)
        return said

    forks = Forks(2, limited)
    assert forks.wait(90) == [1, 1]
    assert "File too large" in forks.errors()[0] and not litter(wanted["out"])
    assert run_together(2, wanted).wait(90) == [0, 0]
    never = {**wanted, "out": tmp_path / "never"}
    assert run_together(2, never).wait(90) == [0, 0]
    one, other = digest(wanted["out"]), digest(tmp_path / "never")
    adapters = [key for key in other if not key.startswith("metrics")]
    assert adapters and {key: one[key] for key in adapters} == {key: other[key] for key in adapters}


class StopsAt(Watcher):
    """Stops a run after so many rounds."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def wants_stop(self) -> bool:
        """Count a round."""
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize(
    ("later", "more"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(3, {}, marks=pytest.mark.slow),
        pytest.param(4, {"sequence_parallel": 2, "shard": "full"}, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_goes_on(
    wanted: dict[str, Any], tmp_path: Path, later: int, more: dict[str, Any]
) -> None:
    """A run of two that is stopped goes on as one of another number: its adapters and losses are within 1e-5, and a line tells."""
    whole = {**wanted, "out": tmp_path / "whole"}
    assert run_together(2, whole).wait(90) == [0, 0]

    def stopped(rank: int) -> None:
        try:
            train(wanted, console=QUIET, watcher=StopsAt(4))
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    assert Forks(2, stopped).wait(90) == [130, 130]
    if later == 1:
        said: list[str] = []
        shown = Console(quiet=True)
        shown.line = said.append  # type: ignore[method-assign]
        train(wanted, console=shown)
    else:
        forks = run_together(later, {**wanted, **more})
        assert forks.wait(90) == [0] * later, forks.errors()
        said = forks.results()[0]
    assert any(f"processes 2 -> {later}" in line and "last bits" in line for line in said)
    assert not more or any("sequence_parallel 1 -> 2" in line for line in said)
    states = [newest(tmp_path / name / "checkpoints") for name in ("run", "whole")]
    one, other = (load_file(state / "tensors.safetensors") for state in states if state is not None)
    assert one.keys() == other.keys()
    apart = {
        key: float((one[key] - other[key]).norm() / other[key].norm().clamp_min(1e-12)) for key in one if "lora_" in key
    }
    assert apart and max(apart.values()) < 1e-5, max(apart.items(), key=lambda item: item[1])
    for name in "abcd":
        lines = [figures(tmp_path / run / "metrics" / f"{name}.jsonl") for run in ("run", "whole")]
        for key in ("loss", "held_out_loss"):
            values = [[line[key] for line in found if key in line] for found in lines]
            assert values[0] and values[0] == pytest.approx(values[1], rel=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "whole": {"shard": "none"},
    "divided base": {"shard": "full"},
    "divided sequences": {"shard": "none", "sequence_parallel": 2},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_kills(wanted: dict[str, Any], place: Path, tmp_path: Path, kind: str, part: int) -> None:
    """SIGKILL of a random process at a random time, 54 times in six parts: the others end, and the same command ends with the bits of the
    run that was never killed, whether its base, its sequences or its pieces are divided."""
    one = options(place, tmp_path, name="one", method="dora", steps=6, batch_size=4, save_every=2, eval_every=3)
    plain = {**one, **{key: wanted[key] for key in ("base", "device", "tokens_per_pass", "valid")}, **KINDS[kind]}
    plain["answer_minutes"] = 0.5  # a process that is killed before it has joined leaves the others waiting so long
    never, began = {**plain, "out": tmp_path / "never"}, time.monotonic()
    assert run_together(2, never).wait(300) == [0, 0]
    expected, seconds = digest(never["out"]), time.monotonic() - began
    rng, landed = random.Random(f"{kind} {part}"), 0
    for number in range(9):
        chosen = {**plain, "out": tmp_path / f"k{number}"}
        forks = run_together(2, chosen)
        time.sleep(rng.uniform(0.05, seconds))
        forks.kill(rng.randrange(2))
        codes = forks.wait(300)
        assert codes.count(-signal.SIGKILL) <= 1, codes
        landed += codes != [0, 0]
        assert run_together(2, chosen).wait(300) == [0, 0]
        assert digest(chosen["out"]) == expected and not litter(chosen["out"])
        print(f"kill {number}, {kind}: exit codes {codes}; {landed} before the end", flush=True)
    assert landed >= 3
