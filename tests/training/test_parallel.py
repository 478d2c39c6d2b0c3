"""Several processes train as one does: gradients, losses, dropout, evaluation, checkpoints, requests, and what happens when one dies."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.devices import PretendDevice
from tests.training.killing import litter
from tests.training.made import QUIET, Ear, World, apart, contents, digest, examples, figures, four_jobs, options
from tests.training.processes import Forks, together

from veneer.adapters import DoRA, LoRA
from veneer.cli.main import main
from veneer.errors import ConfigError
from veneer.models.load import Base
from veneer.training import train
from veneer.training.loop.job import Job, JobState
from veneer.training.parallel.processes import ALONE, Processes, deal, join, joined, split
from veneer.training.run.console import Console
from veneer.training.run.control import ask

STEPS = 20
CASES: dict[str, list[LoRA | DoRA]] = {
    "lora": [LoRA(r=4)],
    "dora with dropout": [DoRA(r=3, lora_dropout=0.2)],
    "four jobs": [LoRA(r=2, lora_dropout=0.3), DoRA(r=3), LoRA(r=8), DoRA(r=2, lora_dropout=0.1)],
}


class Gradients(Ear):
    """Remembers the gradients of each step, divided by the weight count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[list[torch.Tensor]]] = {}

    def stepping(self, job: Job) -> None:
        """Keep copies before they are divided."""
        grads = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in job.parameters]
        self.found.setdefault(job.name, []).append(grads)


def trained(
    methods: list[LoRA | DoRA],
    processes: Processes,
    out: Path | None = None,
    *,
    steps: int = STEPS,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train jobs of ragged rows with SGD: losses, evaluations; gradients and tensors go to ``out``."""
    world, ear = World(), Gradients()
    world.model.to(device or "cpu")
    jobs = []
    for number, method in enumerate(methods):
        held = examples(5, seed=50)
        more: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1e-3, "steps": steps, "batch_size": 4 + number}
        rows = examples(13, seed=number, shortest=4, longest=40)
        jobs.append(
            world.job(f"job{number}", method, seed=number, rows=rows, held_out=held, eval_every=steps // 2, **more)
        )
    trainer = world.trainer(jobs, ear, budget=50, share=70)
    trainer.processes = processes
    trainer.run()
    if out is not None:
        tensors = {job.name: [p.detach() for p in job.parameters] for job in jobs}
        torch.save({"gradients": ear.found, "tensors": tensors}, out)
    state = {job.name: [job.progress.evaluations, job.progress.tokens, world.bank[job.name].draws] for job in jobs}
    return {"losses": ear.losses, "state": state}


@pytest.mark.parametrize(
    ("size", "name", "steps"),
    [
        (4, "four jobs", 6),
        pytest.param(2, "lora", STEPS, marks=pytest.mark.slow),
        pytest.param(2, "dora with dropout", STEPS, marks=pytest.mark.slow),
        pytest.param(2, "four jobs", STEPS, marks=pytest.mark.slow),
        pytest.param(4, "four jobs", STEPS, marks=pytest.mark.slow),
    ],
)
def test_processes_train_as_one(size: int, name: str, steps: int, tmp_path: Path) -> None:
    """The gradients of every step, the losses, the evaluations and the result are those of one process; all processes hold the same."""
    alone = trained(CASES[name], ALONE, tmp_path / "alone", steps=steps)
    found = together(size, lambda p: trained(CASES[name], p, tmp_path / f"{p.rank}", steps=steps))
    expected = torch.load(tmp_path / "alone")
    every = [torch.load(tmp_path / str(rank)) for rank in range(size)]
    for job, of_job in expected["gradients"].items():
        assert len(of_job) == steps
        for step, grads in enumerate(of_job):
            joint = torch.cat([g.flatten().double() for g in every[0]["gradients"][job][step]])
            whole = torch.cat([g.flatten().double() for g in grads])
            assert float((joint - whole).norm() / whole.norm()) < 1e-6
        assert apart(every[0]["tensors"][job], expected["tensors"][job]) < 1e-6
        assert all(
            torch.equal(a, b)
            for one in every
            for a, b in zip(one["tensors"][job], every[0]["tensors"][job], strict=True)
        )
        assert found[0]["losses"][job] == pytest.approx(alone["losses"][job], rel=1e-6)
        (losses, tokens, draws), (other, *counts) = found[0]["state"][job], alone["state"][job]
        assert [tokens, draws] == counts and len(losses) == 3
        assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in other], rel=1e-6)
    assert all(one == found[0] for one in found)


def test_the_loss_of_a_step_is_the_same_number(tmp_path: Path) -> None:
    """One job's pieces are its own, so the loss of the first step has the same bits whoever computed them."""
    alone = trained(CASES["lora"], ALONE, steps=2)["losses"]["job0"]
    (two, _), (four, *_) = (
        together(size, lambda p: trained(CASES["lora"], p, steps=2)["losses"]["job0"]) for size in (2, 4)
    )
    assert alone[0] == two[0] == four[0]
    assert alone == pytest.approx(two, rel=1e-6) and alone == pytest.approx(four, rel=1e-6)


def test_a_share_may_be_empty_and_a_fault_ends_one_job_everywhere() -> None:
    """With more processes than pieces some compute nothing; a NaN or an exception in one process ends its job in all, and no other."""

    def work(processes: Processes) -> dict[str, Any]:
        world, ear = World(), Ear()
        rows = examples(4, longest=6)
        jobs = [
            world.job(name, rows=rows, seed=seed, steps=5, batch_size=2)
            for seed, name in enumerate(("good", "nan", "raises"))
        ]
        forward = world.stepper.forward_backward

        def broken(batch: Any, **rest: Any) -> Any:
            if "nan" in batch.jobs and jobs[1].progress.step == 2:
                with torch.no_grad():
                    jobs[1].parameters[0].fill_(float("nan"))
            if "raises" in batch.jobs and jobs[2].progress.step == 3:
                raise RuntimeError("broken here")
            return forward(batch, **rest)

        world.stepper.forward_backward = broken  # type: ignore[method-assign]
        trainer = world.trainer(jobs, ear, share=0)
        trainer.processes = processes
        trainer.run()
        return {"ends": ear.ends, "steps": [job.progress.step for job in jobs], "reason": jobs[2].reason}

    found = together(4, work)
    assert all(one["ends"] == {"good": "finished", "nan": "non_finite", "raises": "training"} for one in found)
    assert all(one["steps"] == [5, 2, 3] and "broken here" in one["reason"] for one in found)


def test_rows_that_one_process_cannot_read() -> None:
    """A job whose examples one process cannot read fails in all of them; the others go on."""

    def work(processes: Processes) -> dict[str, Any]:
        world, ear = World(), Ear()
        jobs = [world.job("a", steps=3), world.job("b", steps=3, seed=1)]
        if processes.rank == 1:
            jobs[1].next_examples = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        trainer = world.trainer(jobs, ear)
        trainer.processes = processes
        trainer.run()
        return ear.ends

    assert together(2, work) == [{"a": "finished", "b": "data"}] * 2


def test_numbers_are_sent_exactly() -> None:
    """Three numbers of fp32 hold one of fp64; NaN and infinity stay what they are; the largest pieces are dealt first."""
    rng = random.Random(0)
    values = [rng.uniform(-1, 1) * 10 ** rng.uniform(-20, 20) for _ in range(200)]
    for value in (0.0, 1 / 3, 123456.789, *values):
        sent = torch.tensor(split(value), dtype=torch.float32).tolist()
        assert joined(sent) == value
    assert joined(split(float("inf"))) == float("inf") and joined(split(float("nan"))) != joined(split(float("nan")))
    assert deal([10, 40, 30, 20], 2) == [0, 0, 1, 1] and deal([7], 3) == [0] and deal([], 2) == []


# Whole runs


def run_together(size: int, wanted: dict[str, Any], base: Base, *, console: bool = False) -> Forks:
    """Start a run in so many processes."""

    def work(rank: int) -> list[str]:
        said: list[str] = []
        shown = Console(quiet=True)
        if console:
            shown.line = said.append  # type: ignore[method-assign]
        result = train(wanted, base=base, console=shown)
        return [*said, *(f"{job.name} {job.state} {job.steps}" for job in result.jobs.values())]

    return Forks(size, work)


@pytest.fixture
def wanted(place: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of four jobs whose steps have several pieces."""
    return short_run(place, tmp_path / "two")


def short_run(place: Path, out: Path) -> dict[str, Any]:
    """Options of a run of four jobs, of which two end before the others."""
    jobs = [{**job, "steps": steps} for job, steps in zip(four_jobs(), (6, 4, 5, 6), strict=True)]
    more = {"tokens_per_pass": 60, "valid": (place / "valid.jsonl",), "eval_every": 3, "steps": 6, "save_every": 3}
    return {**options(place, out, jobs=jobs, batch_size=4), **more, "device": "cpu"}


@pytest.fixture(scope="module")
def never(place: Path, base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run in two processes that nothing disturbed, and the seconds that it took."""
    out, began = tmp_path_factory.mktemp("never") / "two", time.monotonic()
    assert run_together(2, short_run(place, out), base).wait() == [0, 0]
    return out, time.monotonic() - began


def test_a_run_in_two_processes(wanted: dict[str, Any], never: tuple[Path, float], base: Base, tmp_path: Path) -> None:
    """A run ends with the adapters, metrics and evaluations of one process to rounding, and twice with the same bits."""
    assert run_together(2, wanted, base).wait() == [0, 0]
    assert digest(wanted["out"]) == digest(never[0]) and not litter(wanted["out"])
    train({**wanted, "out": tmp_path / "one"}, base=base, console=QUIET)
    for name in "abcd":
        one, two = (figures(tmp_path / run / "metrics" / f"{name}.jsonl") for run in ("one", "two"))
        assert [line.keys() for line in one] == [line.keys() for line in two]
        for key in ("loss", "held_out_loss", "grad_norm"):
            values = [[line[key] for line in lines if key in line] for lines in (one, two)]
            assert values[0] and values[0] == pytest.approx(values[1], rel=1e-4)


def test_requests_and_halving_reach_all_processes(wanted: dict[str, Any], base: Base, tmp_path: Path) -> None:
    """A request in the run's folder and the rungs of a sweep change the same jobs in every process."""
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
        ask(tmp_path / out, "b", "cancel")
    assert run_together(2, wanted, base).wait() == [0, 0]
    sweep = {key: value for key, value in wanted.items() if key not in ("jobs", "learning_rate")}
    sweep |= {
        "out": tmp_path / "sweep",
        "sweep": {"learning_rate": [1e-2, 1e-6]},
        "halving": True,
        "early_stop_patience": 9,
    }
    forks = run_together(2, sweep, base)
    assert forks.wait() == [0, 0], forks.errors()
    ended = [json.loads(line) for line in (tmp_path / "two" / "events.jsonl").read_text().splitlines()]
    assert [(e["job"], e["code"]) for e in ended if e.get("state") == "cancelled"] == [("b", "cancelled")]
    assert forks.results()[0] == forks.results()[1]
    assert any("cancelled 3" in line for line in forks.results()[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(
    wanted: dict[str, Any], never: tuple[Path, float], base: Base, rank: int
) -> None:
    """After SIGKILL of any process the others end; the resumed run has the bits of one that was never killed."""
    forks = run_together(2, wanted, base)
    while not list(wanted["out"].glob("checkpoints/step-*")):
        time.sleep(0.01)
    forks.kill(rank)
    began = time.monotonic()
    codes = forks.wait(30)
    assert time.monotonic() - began < 20 and codes[rank] == -signal.SIGKILL and codes[1 - rank] > 0
    assert run_together(2, wanted, base).wait() == [0, 0]
    assert digest(wanted["out"]) == digest(never[0]) and not litter(wanted["out"])


def test_a_process_that_hangs_ends_the_run(wanted: dict[str, Any], base: Base) -> None:
    """A process that does not answer within the stated time ends the others with one sentence."""
    forks = run_together(2, {**wanted, "answer_minutes": 0.05, "steps": 4000, "save_every": 1}, base)
    began = time.monotonic()
    while not list(wanted["out"].glob("checkpoints/step-*")) and time.monotonic() - began < 60:
        time.sleep(0.05)
    forks.kill(1, signal.SIGSTOP)
    began = time.monotonic()
    while forks.codes[0] is None and time.monotonic() - began < 30:
        forks.kill(0, 0)
        time.sleep(0.05)
    forks.kill(1)
    assert forks.wait()[0] == 1 and time.monotonic() - began < 25
    assert "another process has ended, or did not answer for 3 s; run the same command to resume" in forks.errors()[0]


def test_a_full_disk_of_the_first_process(wanted: dict[str, Any], base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints that cannot be written are told, and the run goes on in all processes to its end."""
    from veneer.training.run import saver

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "commit", full)
    forks = run_together(2, wanted, base, console=True)
    assert forks.wait() == [0, 0], forks.errors()
    assert any("checkpoint at round 3 failed" in line for line in forks.results()[0])


def test_adapters_that_differ_are_not_saved(
    wanted: dict[str, Any], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a process holds another adapter at a checkpoint, nothing is saved and all end."""
    from veneer.training.parallel.shared_listener import SharedListener

    plain = SharedListener._hash
    monkeypatch.setattr(SharedListener, "_hash", lambda self, job: plain(self, job) + str(self.processes.rank))
    forks = run_together(2, wanted, base)
    assert forks.wait() == [1, 1]
    assert 'process 1 holds a different adapter "a" from process 0' in forks.errors()[0]
    assert not list((wanted["out"] / "checkpoints").glob("step-*"))


def test_more_processes_than_cores_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command starts no process and writes nothing."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("veneer.cli._launch.cores", lambda: 2)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert main(["train", "train.jsonl", "--base", "base", "--processes", "3", "--out", "three"]) == 2
    assert "processes: 3 do not fit this machine, which has 2 cores" in capsys.readouterr().err
    assert not (place / "three").exists()


def test_mistakes_are_told_before_anything_starts(
    wanted: dict[str, Any], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of processes that nothing started, incomplete variables, too few GPUs, one GPU for all; a wrong option is told once."""
    with pytest.raises(
        ConfigError, match="processes: 3 are asked for, and 1 run; use veneer train --processes 3 in a shell"
    ):
        train({**wanted, "processes": 3}, base=base, console=QUIET)
    forks = run_together(2, {**wanted, "data": ("missing.jsonl",)}, base)
    assert forks.wait() == [1, 1]
    assert "there is no file missing.jsonl" in forks.errors()[0] and not forks.errors()[1]
    assert not wanted["out"].exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, and RANK"), join(1, "cpu", 1):
        pass
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match="2 processes need as many CUDA devices, and this machine has 0"),
        join(1, "cuda", 1),
    ):
        pass
    with pytest.raises(ConfigError, match="all processes would use cuda:1; give cuda"), join(1, "cuda:1", 1):
        pass
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for device in ("mps", "auto"):
        with pytest.raises(ConfigError, match=r"mps is one GPU, .* use --device cpu"), join(1, device, 1):
            pass


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the process's current device before the processes meet: torch divides a base there, whatever device the weights are on."""
    done: list[Any] = []
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("veneer.training.parallel.processes._end_with_launcher", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: done.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with PretendDevice(), join(2, "auto", 1) as processes:
        assert processes.rank == 1
    assert done == [torch.device("cuda:1"), "cpu:gloo,cuda:nccl"]


def test_processes_on_a_gpu(tmp_path: Path) -> None:
    """Pieces, sums and losses of a device meet no tensor of the CPU; the numbers are those of processes on a CPU."""

    def work(processes: Processes) -> dict[str, Any]:
        with PretendDevice() as device:
            return trained(CASES["dora with dropout"], processes, steps=2, device=device.device)

    expected = together(2, lambda processes: trained(CASES["dora with dropout"], processes, steps=2))
    found = together(2, work)
    assert found[0]["losses"]["job0"] == pytest.approx(expected[0]["losses"]["job0"], rel=1e-5)
    assert found[0] == found[1] and found[0]["state"]["job0"][1:] == expected[0]["state"]["job0"][1:]


@pytest.mark.slow
def test_the_launcher(place: Path, tmp_path: Path) -> None:
    """``veneer train --processes 2`` ends as one process does; a killed child is one sentence, and the command resumes."""
    words = [str(place / "train.jsonl"), "--base", str(place / "base"), "--out", str(tmp_path / "run"), "--steps", "60"]
    words += [
        "--tokens-per-pass",
        "60",
        "--batch-size",
        "8",
        "--save-every",
        "2",
        "--no-plan",
        "--r",
        "2",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "veneer", "train", *words, "--processes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "run").glob("checkpoints/step-*")):
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    subprocess.run(["kill", "-9", children[1]], check=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 1 of 2 was ended by SIGKILL, so the run has ended; run the same command to resume" in said
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "finished after 60 steps" in done.stdout and "resuming at step" in done.stdout
    assert contents(tmp_path / "run") and JobState.FINISHED.value in done.stdout
