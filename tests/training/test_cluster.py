"""A run whose jobs are shared by workers: here workers in threads, which can be lost on purpose; with Ray in ``test_ray.py``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import pytest
from tests.training.made import QUIET, options

from veneer.cli._run_list import list_runs
from veneer.config import TrainOptions
from veneer.errors import ConfigError, TrainingError
from veneer.models.load import Base
from veneer.training import train
from veneer.training.cluster import driver
from veneer.training.cluster.parts import divide, part_of
from veneer.training.cluster.ray_workers import Slot, connected
from veneer.training.cluster.worker import ClusterWorker
from veneer.training.loop.step import Stepper
from veneer.training.run.control import ask

ALONE = threading.RLock()
"""Held by the worker that trains: the tests' processes have one thread."""


class Gone(BaseException):
    """The end of a worker's process, as the driver sees it."""


class Method:
    """A method of a worker that is called with ``remote``."""

    def __init__(self, pool: ThreadPoolExecutor, method: Callable[..., Any]) -> None:
        self._pool, self._method = pool, method

    def remote(self, *args: Any) -> Future[Any]:
        return self._pool.submit(self._method, *args)


class Actor:
    """A worker in threads. ``dies_at``: the step after which its process ends."""

    def __init__(self, worker: ClusterWorker, dies_at: int | None) -> None:
        self.worker, self.pool, self.dies_at = worker, ThreadPoolExecutor(4), dies_at
        follower = worker._follower
        usual = follower.line

        def line(job: Any, values: dict[str, Any]) -> None:
            usual(job, values)
            if self.dies_at == job.progress.step:
                raise Gone

        follower.line = line  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Method:
        method = getattr(self.worker, name)

        def alone(*args: Any) -> Any:
            with ALONE if name in ("train", "load") else contextlib.nullcontext():
                return method(*args)

        return Method(self.pool, alone)


class Cluster:
    """Machines in one process. ``dies_at``: for each worker, in the order of their start."""

    def __init__(self, machines: int = 2, dies_at: Sequence[int | None] = ()) -> None:
        self.machines, self.dies_at, self.actors = machines, [*dies_at], list[Actor]()
        self.changes: dict[str, Callable[[int, Any], Any]] = {}
        """Answers of some methods, by the worker's number and the true answer."""

    def slots(self) -> list[Slot]:
        return [Slot(f"n{i}", f"10.0.0.{i}", 0, 1.0, 0) for i in range(self.machines)]

    def start(self, slot: Slot, train_part: Any) -> Actor:
        worker, number = ClusterWorker(train_part), len(self.actors)
        for name, change in self.changes.items():
            true = getattr(worker, name)
            setattr(worker, name, lambda *args, true=true, change=change: change(number, true(*args)))
        self.actors.append(Actor(worker, self.dies_at.pop(0) if self.dies_at else None))
        return self.actors[-1]

    def wait(self, calls: Sequence[Future[Any]], seconds: float) -> list[Future[Any]]:
        return list(wait_for(calls, seconds, "FIRST_COMPLETED").done)

    def answers(self, calls: Sequence[Future[Any]], seconds: float) -> list[Any]:
        return [self.answer(call, seconds) for call in calls]

    def answer(self, call: Future[Any], seconds: float) -> Any:
        try:
            return call.result(seconds)
        except BaseException as error:
            return error

    def lost(self, answer: Any) -> bool:
        return isinstance(answer, Gone)

    def end(self, actor: Actor) -> None:
        actor.pool.shutdown(wait=False)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], Cluster]:
    """Let runs find this cluster at any address."""

    def found(cluster: Cluster) -> Cluster:
        @contextlib.contextmanager
        def connect(address: str) -> Iterator[Cluster]:
            yield cluster

        monkeypatch.setattr(driver, "connected", connect)
        monkeypatch.setattr(driver, "_POLL", 0.02)
        monkeypatch.setattr(driver, "_LOOK_SECONDS", 0.0)
        return cluster

    return found


def sweep(place: Path, out: Path, **others: Any) -> dict[str, Any]:
    """Four jobs in turn, so that a job's bits do not depend on those beside it."""
    jobs = [{"name": f"job{i}", "r": 1 + i % 2, "seed": i, **({"method": "dora"} if i == 3 else {})} for i in range(4)]
    plain = {"jobs": jobs, "steps": 5, "save_every": 2, "tokens_per_shared_pass": 0, "compile": False, "threads": 1}
    return options(place, out, **{**plain, **others})


def adapters(out: Path) -> dict[str, str]:
    """Hashes of the adapters' weights."""
    found = {str(p.relative_to(out)): p for p in sorted((out / "adapters").glob("*/adapter_model.safetensors"))}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The adapters of the sweep without a cluster."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(TrainOptions(**sweep(place, out)), console=QUIET)
    return adapters(out)


def test_a_cluster_ends_with_the_same_bytes(place: Path, tmp_path: Path, use: Any, alone: dict[str, str]) -> None:
    """Jobs on two workers give the adapters of one process; the folder is one run, with metrics and states of all jobs."""
    use(Cluster())
    out = tmp_path / "run"
    result = train(TrainOptions(**sweep(place, out, cluster="auto")), console=QUIET)
    assert adapters(out) == alone and len(alone) == 4
    assert [(job.name, job.state, job.steps) for job in result.jobs.values()] == [
        (f"job{i}", "finished", 5) for i in range(4)
    ]
    assert result.jobs["job3"].changes["method"] == "dora" and "r" in result.jobs["job0"].changes
    assert {(s.job, s.state, s.step) for s in list_runs(tmp_path)} == {(f"job{i}", "finished", 5) for i in range(4)}
    parts = json.loads((out / "run.json").read_text())["parts"]
    assert sorted(name for part in parts for name in part) == sorted(result.jobs) and len(parts) == 4


def test_jobs_of_a_part_share_passes(place: Path, tmp_path: Path, use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker trains the jobs of its part together, with the bytes of an ordinary run of these jobs."""
    beside: set[int] = set()
    forward = Stepper.forward_backward

    def counted(self: Stepper, batch: Any, **rest: Any) -> Any:
        beside.add(len(set(batch.jobs)))
        return forward(self, batch, **rest)

    monkeypatch.setattr(Stepper, "forward_backward", counted)
    use(Cluster(machines=1))
    shared = sweep(place, tmp_path / "run", tokens_per_shared_pass=512)
    train(TrainOptions(**shared, cluster="auto"), console=QUIET)
    assert 2 in beside
    expected = {}
    for at in (0, 2):
        out = tmp_path / f"from {at}"
        train(TrainOptions(**{**shared, "jobs": shared["jobs"][at : at + 2], "out": out}), console=QUIET)
        expected |= adapters(out)
    assert adapters(tmp_path / "run") == expected and len(expected) == 4


def test_a_cluster_trains_heads(place: Path, tmp_path: Path, use: Any) -> None:
    """Workers load the base with the head that the task of the jobs asks for."""
    use(Cluster(machines=1))
    rows = [{"text": f"{i} {'plus' if i % 2 else 'minus'}", "label": "abc"[i % 3]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {
        "data": (tmp_path / "rows.jsonl",),
        "task": "classification",
        "jobs": [{"name": "a"}, {"name": "b", "r": 3}],
    }
    for out, cluster in (("run", "auto"), ("alone", None)):
        train(TrainOptions(**sweep(place, tmp_path / out, **more, cluster=cluster)), console=QUIET)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "alone") and len(adapters(tmp_path / "run")) == 2


def test_a_lost_worker_costs_the_steps_since_its_checkpoint(
    place: Path, tmp_path: Path, use: Any, alone: dict[str, str]
) -> None:
    """Its jobs go on from their checkpoint on another worker, and end with the same bytes."""
    cluster = use(Cluster(dies_at=(3,)))
    out = tmp_path / "run"
    train(TrainOptions(**sweep(place, out, cluster="auto")), console=QUIET)
    assert adapters(out) == alone
    assert len(cluster.actors) == 3  # the lost one was replaced
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    lost = next(event for event in events if event["event"] == "worker_lost")
    begun = [
        json.loads(line) for line in (out / "parts" / f"{lost['part']:03d}" / "events.jsonl").read_text().splitlines()
    ]
    assert [event["round"] for event in begun if event["event"] == "started"] == [0, 2]


def test_the_same_command_resumes(place: Path, tmp_path: Path, use: Any, alone: dict[str, str]) -> None:
    """If all workers are lost, the run says that it is saved, and ends with the same bytes later, with other workers."""
    use(Cluster(machines=1, dies_at=(3,) * 9))
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"no worker is left; .* the same command resumes it|3 workers ended"):
        train(TrainOptions(**sweep(place, out, cluster="auto")), console=QUIET)
    assert {s.state for s in list_runs(tmp_path)} <= {"interrupted", "finished"}
    use(Cluster(machines=3))
    train(TrainOptions(**sweep(place, out, cluster="auto")), console=QUIET)
    assert adapters(out) == alone
    with pytest.raises(ConfigError, match="holds a run on a cluster; resume it with --cluster"):
        train(TrainOptions(**sweep(place, out)), console=QUIET)


def test_requests_reach_the_parts(place: Path, tmp_path: Path, use: Any) -> None:
    """A cancelled job ends, wherever it is; the others finish, and a request that cannot be read ends nothing."""
    use(Cluster())
    out = tmp_path / "run"
    out.mkdir()
    (out / "control.json").write_text('{"job1": "stop"}')
    ask(out, "job2", "cancel")
    result = train(TrainOptions(**sweep(place, out, cluster="auto")), console=QUIET)
    assert {job.name: job.state for job in result.jobs.values()} == {
        **dict.fromkeys(("job0", "job1", "job3"), "finished"),
        "job2": "cancelled",
    }


def test_a_failed_job_leaves_the_others(place: Path, tmp_path: Path, use: Any) -> None:
    """A job whose loss is not finite fails, alone in its part too, and is told in the result."""
    use(Cluster())
    jobs = [{"name": "good"}, {"name": "bad", "learning_rate": 1e30, "clip": None, "optimizer": "sgd"}]
    result = train(
        TrainOptions(**sweep(place, tmp_path / "run", jobs=jobs, cluster="auto", warmup_steps=0)), console=QUIET
    )
    assert result.jobs["good"].state == "finished" and result.jobs["bad"].state == "failed"


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            "versions",
            lambda n, a: (a[0], {**a[1], "torch": "2.0"}) if n else a,
            "on 10.0.0.1 has torch 2.0, and this machine has",
        ),
        ("sees", lambda n, a: not n, "on 10.0.0.1 does not see the files of"),
        (
            "load",
            lambda n, a: type(a)("other", a.fits) if n else a,
            "on 10.0.0.1 has other weights of .*base than the first",
        ),
        ("load", lambda n, a: "no base here" if n else a, "on 10.0.0.1 cannot train: no base here"),
    ],
)
def test_workers_that_do_not_fit_are_refused(
    place: Path, tmp_path: Path, use: Any, method: str, change: Any, message: str
) -> None:
    """One sentence before anything starts, and nothing is left behind."""
    use(Cluster()).changes = {method: change}
    with pytest.raises(ConfigError, match=message):
        train(TrainOptions(**sweep(place, tmp_path / "run", cluster="auto")), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_options_that_need_one_process(place: Path, base: Base, tmp_path: Path, use: Any) -> None:
    """Halving, several processes and several heads are refused by name; so is a folder with a run of one machine."""
    use(Cluster())
    for more, message in (
        ({"halving": True}, "halving compares jobs"),
        ({"processes": 2}, "each worker of a cluster is one process"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(TrainOptions(**sweep(place, tmp_path / "run", cluster="auto", **more)), console=QUIET)
    heads = [{"name": "a"}, {"name": "b", "task": "classification"}]
    with pytest.raises(ConfigError, match="their tasks differ: sft and classification"):
        train(TrainOptions(**sweep(place, tmp_path / "run", cluster="auto", jobs=heads)), console=QUIET)
    given = TrainOptions(**sweep(place, tmp_path / "run", cluster="auto"))
    with pytest.raises(ConfigError, match="each worker loads the base itself"):
        train(given, base=base, console=QUIET)
    with pytest.raises(ConfigError, match="each part of a run on a cluster has its own"):
        train(given, resume_from="step-00000002", console=QUIET)
    train(TrainOptions(**sweep(place, tmp_path / "one", steps=1)), console=QUIET)
    with pytest.raises(ConfigError, match="holds a run of one machine"):
        train(TrainOptions(**sweep(place, tmp_path / "one", cluster="auto")), console=QUIET)


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("127.0.0.1:9", TrainingError, "no Ray cluster answers at 127.0.0.1:9 .*; start one with `ray start --head"),
        (
            "ray://host:10001",
            ConfigError,
            "expected auto or HOST:PORT, such as 10.0.0.1:6379, found 'ray://host:10001'",
        ),
    ],
)
def test_a_cluster_that_cannot_be_reached(address: str, error: type[Exception], message: str) -> None:
    """One sentence, at once."""
    pytest.importorskip("ray")
    with pytest.raises(error, match=message), connected(address):
        pass


def test_files_of_a_part_are_named_by_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker runs in another folder; a base that is no folder here keeps its name."""
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    for base, named in (("base", str(tmp_path / "base")), ("smollm2-135m", "smollm2-135m")):
        given = TrainOptions(data=("rows.jsonl",), base=base)
        assert part_of(given, {"a": given}, tmp_path, 1, ["a"]).options["base"] == named


def test_jobs_are_divided_by_workers_and_memory() -> None:
    """At most as many jobs in a part as fit, at least two parts for each worker, all of like size, in order."""
    names = [f"j{i}" for i in range(24)]
    assert [len(part) for part in divide(names, 2, 100)] == [6, 6, 6, 6]
    assert [len(part) for part in divide(names, 2, 5)] == [5, 5, 5, 5, 4]
    assert [len(part) for part in divide(names[:3], 4, 100)] == [1, 1, 1]
    assert [name for part in divide(names, 3, 2) for name in part] == names
