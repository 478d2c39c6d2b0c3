"""Sweeps: lists become jobs, the worse half stops at each rung, and a table and a picture tell what came of it."""

from __future__ import annotations

import importlib
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.training.made import QUIET, digest, options

from veneer.cli.main import main
from veneer.config import TrainOptions
from veneer.errors import ConfigError
from veneer.models.load import Base
from veneer.training import train
from veneer.training.run import result as results
from veneer.training.run.console import Console
from veneer.training.run.jobs import expand


def asked(**others: Any) -> TrainOptions:
    """Options without a file behind them."""
    return TrainOptions(**{"data": ("rows.jsonl",), "out": Path("runs/s"), **others})


def tensors_of(adapter: Path) -> dict[str, list[Any]]:
    """The numbers of an adapter's file."""
    return {key: value.tolist() for key, value in load_file(adapter / "adapter_model.safetensors").items()}


def names(**others: Any) -> list[str]:
    return [*expand(asked(**others), files=False)]


def test_lists_become_jobs_in_every_combination() -> None:
    """A list where one value is expected is tried; names say which values a job has; jobs are the same options otherwise."""
    found = expand(asked(r=[4, 16], learning_rate=[1e-4, 5e-4], seed=[0, 1]), files=False)
    assert len(found) == 8
    assert [*found][:2] == ["s-r_4-learning_rate_0.0001-seed_0", "s-r_4-learning_rate_0.0001-seed_1"]
    job = found["s-r_16-learning_rate_0.0005-seed_1"]
    assert (job.r, job.learning_rate, job.seed) == (16, 5e-4, 1)


def test_full_fine_tuning_is_one_job_whatever_the_ranks() -> None:
    """It has no rank, so a sweep over ranks holds it once for each learning rate."""
    assert names(method=["lora", "full"], r=[2, 4]) == [
        "s-method_lora-r_2",
        "s-method_lora-r_4",
        "s-method_full",
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"jobs": [{"name": "../up"}, {"name": "b"}]}, r"jobs\[0\]: name: .*\.\."),
        ({"jobs": [{"name": ".."}]}, "name"),
        ({"jobs": [{"name": "a/b"}]}, "name"),
        ({"jobs": [{"name": "a"}, {"name": "a"}]}, r'jobs\[1\]: the name "a" is taken by an earlier job'),
        (
            {"jobs": [{"name": "sql"}, {"name": "SQL"}]},
            r'the name "SQL" is taken by an earlier job \("sql" is the same folder',
        ),
        ({"jobs": [{"name": "a"}, {"name": "b", "out": "elsewhere"}]}, "out is an option of the whole run"),
        ({"seed": [*range(100)], "warmup_steps": [*range(100)]}, "asks for 10,000 jobs; at most 256"),
        ({"jobs": [{"name": "a", "lern_rate": 1}]}, "unknown option 'lern_rate'; did you mean"),
        ({"r": [4, 0]}, "r"),
        ({"sweep": {"base": ["a", "b"]}}, "base cannot be swept"),
    ],
)
def test_jobs_that_cannot_be_are_told(change: dict[str, Any], says: str) -> None:
    """One sentence before anything starts: bad names, twins (also where a disk takes a and A for one), too many, unknown options."""
    with pytest.raises(ConfigError, match=says):
        expand(asked(**change), files=False)


def test_a_job_without_data_is_told_with_its_name(tmp_path: Path) -> None:
    """A job that names no file, and one whose file is not there, are told before a base is loaded; all at once."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"jobs\[1\]: data names no file"):
        expand(TrainOptions(jobs=[{"name": "a", "data": [str(tmp_path / "a.jsonl")]}, {"name": "b"}]))
    jobs = [{"name": "a", "data": ["none.jsonl"]}, {"name": "b", "data": ["nor.jsonl"]}]
    with pytest.raises(
        ConfigError, match=r'(?s)job "a": data: there is no file none.jsonl.*job "b": data: there is no'
    ):
        expand(TrainOptions(jobs=jobs))


def test_all_that_is_wrong_with_jobs_is_told_at_once() -> None:
    """A bad name, a twin and a job without examples are three lines of one error."""
    jobs = [{"name": "../x", "data": ["a"]}, {"name": "a", "data": ["a"]}, {"name": "A", "data": ["a"]}, {"name": "c"}]
    with pytest.raises(ConfigError) as caught:
        expand(TrainOptions(jobs=jobs), files=False)
    said = str(caught.value)
    for part in ("jobs[0]: name", 'jobs[2]: the name "A" is taken', "jobs[3]: data names no file"):
        assert part in said


def test_bad_jobs_leave_nothing_behind(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line: exit code 2, one sentence, no folder."""
    monkeypatch.chdir(tmp_path)
    for wrong in (["--r", ",".join(["4"] * 300)], ["--set", "jobs.0.name=.."]):
        assert main(["train", str(place / "train.jsonl"), "--out", "runs/a", *wrong]) == 2
    assert not (tmp_path / "runs").exists()


def test_halving_stops_the_worse_half_at_each_rung(place: Path, base: Base, tmp_path: Path) -> None:
    """Four jobs of eight steps: two stop after two, one after four, the best goes to the end, with the bits of its run without halving."""
    wanted = {
        "learning_rate": [1e-5, 3e-2, 1e-4, 3e-3],
        "valid": (place / "valid.jsonl",),
        "steps": 8,
        "eval_every": 100,
    }
    halving = {**wanted, "halving": True, "tokens_per_shared_pass": 0}
    halved = train(options(place, tmp_path / "h" / "s", **halving), base=base, console=QUIET)
    whole = train(options(place, tmp_path / "w" / "s", **wanted, tokens_per_shared_pass=0), base=base, console=QUIET)
    steps = sorted(job.steps for job in halved.jobs.values())
    assert steps == [2, 2, 4, 8]
    (best,) = (job for job in halved.jobs.values() if job.state == "finished")
    assert tensors_of(best.adapter) == tensors_of(whole.jobs[best.name].adapter)
    for rung in (2, 4):
        there = {job.name: dict(job.losses)[rung] for job in halved.jobs.values() if rung in dict(job.losses)}
        stopped = {job.name for job in halved.jobs.values() if job.steps == rung}
        assert min(there[name] for name in stopped) >= max(there[name] for name in there.keys() - stopped)
    for job in halved.jobs.values():
        if job.state != "finished":
            assert job.state == "cancelled" and "held-out loss" in job.reason and "number" in job.reason
    again = train(options(place, tmp_path / "h" / "s", **halving), base=base, console=QUIET)
    assert again == halved


def test_the_table_and_the_picture_have_the_base_and_full_fine_tuning(place: Path, base: Base, tmp_path: Path) -> None:
    """The table has a row a job, the best first, and the base; the picture has lines for the base and for full fine-tuning."""
    pytest.importorskip("matplotlib")
    wanted = {"method": ["lora", "dora", "full"], "r": [1, 2], "steps": 4, "lora_dropout": 0.0}
    result = train(options(place, tmp_path / "s", **wanted, valid=(place / "valid.jsonl",)), base=base, console=QUIET)
    assert len(result.jobs) == 5
    header, rows = results.table_of(result)
    assert header[:3] == ["job", "method", "r"] or header[:3] == ["job", "r", "method"]
    assert rows[-1][0] == "base" and len(rows) == 6
    finals = [float(row[-2]) for row in rows[:-1]]
    assert finals == sorted(finals)
    (row,) = (row for row in rows if "full" in row)
    assert row[header.index("r")] == "-"
    table, picture = results.write_summary(result)
    assert [line["job"] for line in json.loads(table.read_text())] == [row[0] for row in rows[:-1]]
    text = picture.read_text()
    assert text.startswith("<?xml") and "full fine-tuning" in text and "base" in text


def test_full_fine_tuning_trains_the_layers_whole_beside_others(place: Path, base: Base, tmp_path: Path) -> None:
    """As a job among others it moves every weight that an adapter would act on, leaves the base alone, and its neighbour is as alone."""
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    jobs = [{"name": "whole", "method": "full"}, {"name": "a", "lora_dropout": 0.0}]
    said = io.StringIO()
    both = train(
        options(place, tmp_path / "both", jobs=jobs, steps=4, tokens_per_shared_pass=0),
        base=base,
        console=Console(said),
    )
    assert both.jobs["whole"].state == "finished"
    assert "whole: full fine-tuning of 7 layers" in said.getvalue()
    assert all(value.equal(before[name]) for name, value in base.model.state_dict().items())
    alone = train(options(place, tmp_path / "a", steps=4, lora_dropout=0.0), base=base, console=QUIET)
    assert tensors_of(both.jobs["a"].adapter) == tensors_of(alone.adapter)


def test_a_sweep_goes_on_to_the_same_bits(place: Path, base: Base, tmp_path: Path) -> None:
    """Stopped in the middle and gone on with, halving and all, a sweep ends as one that was never stopped."""
    import os

    class Stopper(Console):
        shown = 0

        def progress(self, text: str, *, important: bool = False) -> None:
            self.shown += 1
            if self.shown == 11:
                os.kill(os.getpid(), 2)

    wanted = {"r": [1, 2, 3, 4], "valid": (place / "valid.jsonl",), "steps": 8, "halving": True, "save_every": 3}
    train(options(place, tmp_path / "never" / "s", **wanted), base=base, console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        train(options(place, tmp_path / "stopped" / "s", **wanted), base=base, console=Stopper(quiet=True))
    train(options(place, tmp_path / "stopped" / "s", **wanted), base=base, console=QUIET)
    assert digest(tmp_path / "stopped" / "s") == digest(tmp_path / "never" / "s")


class Tracker(types.ModuleType):
    """A stand-in for a tracker's package, with the three calls that Trackio and Weights & Biases have."""

    def __init__(self, name: str, *, fails: str = "") -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails

    def init(self, **settings: Any) -> None:
        if self.fails == "init":
            raise ConnectionError("no network")
        self.calls.append(("init", settings))

    def log(self, figures: dict[str, float]) -> None:
        if self.fails == "log":
            raise ConnectionError("no network")
        self.calls.append(("log", figures))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_figures_go_to_a_tracker(
    name: str, place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of figures is handed on under the job's name, and the run is begun and ended once."""
    package = Tracker(name)
    monkeypatch.setitem(sys.modules, name, package)
    train(options(place, tmp_path / "runs" / "a", steps=3, track=name), base=base, console=QUIET)
    assert [call for call, _ in package.calls] == ["init", "log", "log", "log", "finish"]
    assert package.calls[0][1]["project"] == "runs" and package.calls[0][1]["name"] == "a"
    assert {"a/step", "a/loss", "a/lr", "a/grad_norm"} <= set(package.calls[1][1])


def test_figures_go_to_tensorboard(place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job has a writer of its own below the run's folder."""
    written: dict[str, list[tuple[str, float, int]]] = {}

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            self.lines = written.setdefault(Path(folder).name, [])

        def add_scalar(self, key: str, value: float, step: int) -> None:
            self.lines.append((key, value, step))

        def close(self) -> None:
            self.lines.append(("closed", 0.0, 0))

    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    assert importlib.import_module("torch.utils.tensorboard") is package
    jobs = [{"name": "a"}, {"name": "b", "r": 1}]
    train(options(place, tmp_path / "r", steps=2, jobs=jobs, track="tensorboard"), base=base, console=QUIET)
    assert set(written) == {"a", "b"}
    assert {step for key, _, step in written["a"] if key == "loss"} == {1, 2} and written["b"][-1][0] == "closed"


@pytest.mark.parametrize("call", ["init", "log"])
def test_a_tracker_that_fails_is_left(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A tracker's error is told once and the run goes on; a package that is missing is an error that says how to get it."""
    monkeypatch.setitem(sys.modules, "trackio", Tracker("trackio", fails=call))
    said = io.StringIO()
    result = train(options(place, tmp_path / "a", steps=3, track="trackio"), base=base, console=Console(said))
    assert result.jobs["a"].state == "finished"
    assert said.getvalue().count("the tracker failed and is no longer used: ConnectionError: no network") == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        train(options(place, tmp_path / "b", steps=3, track="wandb"), base=base, console=QUIET)
