"""``veneer serve`` as a process: its start screen, its signals, a kill in the middle of jobs, and mistakes in one sentence."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import count as counter
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from veneer.cli import main as cli
from veneer.serve.store.database import Database
from veneer.serve.store.jobs import JobStore

KEY = "veneer-test-key"
NUMBERS = counter()


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["veneer.serve.server", "veneer.checkpoints", "veneer.models.load", "transformers.models.llama"]
)


class Process:
    """A server in a process of its own. ``forked``: one that has imported its libraries already, for tests with many starts."""

    def __init__(self, place: Path, *words: str, state: Path, forked: bool = False, **environment: str) -> None:
        words = (
            "serve",
            "--base",
            str(place / "base"),
            "--dtype",
            "float32",
            "--port",
            "0",
            "--state",
            str(state),
            *words,
        )
        environment = {"VENEER_API_KEY": KEY, "OMP_NUM_THREADS": "1", **environment}
        self._output = state.parent / f"output-{next(NUMBERS)}"
        self.process: Any
        if forked:
            self.process = FORKS.Process(target=_serve, args=(words, self._output, environment), daemon=True)
            self.process.start()
        else:
            with self._output.open("wb") as output:
                command = [sys.executable, "-m", "veneer", *words]
                environment = {**os.environ, **environment}
                self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        until = time.monotonic() + 300
        while "client.chat" not in self.output and time.monotonic() < until and self._code() is None:
            time.sleep(0.02)
        match = re.search(r"http://127\.0\.0\.1:\d+/v1", self.output)
        assert match, self.output
        self.url = match.group()

    @property
    def output(self) -> str:
        """What the server has written."""
        return self._output.read_text(encoding="utf-8") if self._output.exists() else ""

    def _code(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def client(self, **options: Any) -> openai.OpenAI:
        """A client of the server."""
        return openai.OpenAI(base_url=self.url, api_key=KEY, **{"timeout": 60, "max_retries": 0, **options})

    def end(self, number: signal.Signals) -> int:
        """Send a signal; returns the exit code."""
        os.kill(self.process.pid, number)
        until = time.monotonic() + 120
        while (code := self._code()) is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        return code


def _serve(words: tuple[str, ...], output: Path, environment: dict[str, str]) -> None:
    """The body of a forked server."""
    os.environ |= environment
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(cli.main(words))


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message with which ``veneer serve`` ends."""
    assert cli.main(["serve", *words]) in (1, 2)
    return capsys.readouterr().err


def test_port_in_use_and_state_in_use(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A port that is taken and a state that another server uses are one sentence each."""
    from veneer.checkpoints.run_state import Lock

    monkeypatch.setenv("VENEER_API_KEY", KEY)
    words = ["--base", str(place / "base"), "--dtype", "float32", "--state", str(tmp_path / "state")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert re.search(
            r"port \d+ of 127\.0\.0\.1 is in use; choose another one with --port",
            error_of(capsys, *words, "--port", port),
        )
    with Lock(tmp_path / "state"):
        message = error_of(capsys, *words, "--port", "0")
    assert "is in use by another process" in message and "--state" in message and "--out" not in message


def test_other_interfaces_need_a_key(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Another interface without a key is refused, and so are a short key and a folder that is not there."""
    monkeypatch.delenv("VENEER_API_KEY", raising=False)
    words = ["--base", str(place / "base"), "--dtype", "float32", "--state", str(tmp_path / "state"), "--port", "0"]
    assert "can be reached from other machines; set a key" in error_of(capsys, *words, "--host", "0.0.0.0")
    assert "no such folder" in error_of(capsys, *words, "--adapters", str(tmp_path / "none"))
    assert "choose one for --cluster" in error_of(capsys, *words, "--cluster", "auto")
    assert "leave out --cluster" in error_of(capsys, *words, "--cluster", "auto", "--replay", "trace.jsonl")
    assert "set a key" in error_of(capsys, *words[:-1], "8123", "--cluster", "auto", "--host", "0.0.0.0")
    monkeypatch.setenv("VENEER_API_KEY", "short")
    assert "VENEER_API_KEY: expected at least 8" in error_of(capsys, *words)


@pytest.mark.slow
def test_start_screen_and_signals(place: Path, tmp_path: Path) -> None:
    """The screen has URL, key and calls; keys are generated once and readable by the owner only; SIGTERM ends a server soon."""
    server = Process(place, state=tmp_path / "state", VENEER_API_KEY="")
    for part in ("Veneer serves at http://127.0.0.1:", "models   base", "curl", "openai.OpenAI", "export $("):
        assert part in server.output
    keys = tmp_path / "state" / "keys"
    stored = dict(line.split("=", 1) for line in keys.read_text(encoding="utf-8").splitlines())
    assert keys.stat().st_mode & 0o777 == 0o600 and stored["VENEER_API_KEY"] not in server.output
    client = openai.OpenAI(base_url=server.url, api_key=stored["VENEER_API_KEY"], timeout=30)
    assert client.completions.create(model="base", prompt="a", max_tokens=2).usage
    began = time.monotonic()
    assert server.end(signal.SIGTERM) == 0 and time.monotonic() - began < 10
    again = Process(place, state=tmp_path / "state", VENEER_API_KEY="")
    assert stored["VENEER_API_KEY"] in keys.read_text(encoding="utf-8")
    assert again.end(signal.SIGINT) in (0, 130)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "count", "parallel", "steps"),
    [(3, 6, 2, 40), pytest.param(50, 24, 4, 300, marks=pytest.mark.timeout(3600))],
    ids=["a few", "fifty"],
)
def test_killed_server_makes_each_job_once(
    place: Path, tmp_path: Path, kills: int, count: int, parallel: int, steps: int
) -> None:
    """Servers are killed at any moment while clients retry: each job ends once, with events without a gap, and none is made twice."""
    state, draw = tmp_path / "state", random.Random(0)
    server = Process(place, "--jobs", str(parallel), state=state, forked=True)
    client = server.client()
    with (place / "train.jsonl").open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune").id
    asked: Any = {
        "model": "base",
        "training_file": file,
        "extra_body": {"adapter": {"r": 2}, "training": {"steps": steps, "save_every": 10, "learning_rate": 1e-2}},
        "hyperparameters": {"batch_size": 2},
    }

    def created(number: int) -> str:
        """The id of a job whose request may have been sent before."""
        again = {"suffix": f"job{number}", "extra_headers": {"Idempotency-Key": f"job{number}"}}
        return client.fine_tuning.jobs.create(**asked, **again).id

    jobs = [created(number) for number in range(count)]
    for _ in range(kills):
        time.sleep(draw.uniform(0.1, 2.0))
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        server = Process(place, "--jobs", str(parallel), state=state, forked=True)
        client = server.client()
        # The client sends a request again whose answer was lost.
        number = draw.randrange(count)
        assert created(number) == jobs[number]
    until = time.monotonic() + 120 + 30 * count
    while any(client.fine_tuning.jobs.retrieve(job).status != "succeeded" for job in jobs):
        assert time.monotonic() < until
        time.sleep(0.2)
    assert len(list(client.fine_tuning.jobs.list())) == count
    assert {f"job{i}" for i in range(count)} <= {model.id for model in client.models.list()}
    server.end(signal.SIGTERM)
    database = Database(state / "state.db")
    store = JobStore(database)
    for job in jobs:
        events, _ = store.events(job, after=None, limit=10_000)
        assert [event["seq"] for event in events] == list(range(len(events), 0, -1))
        messages = [event["message"] for event in events]
        trained = [message.split(":")[0] for message in messages if message.startswith("Step ")]
        assert sorted(trained) == sorted(f"Step {step}/{steps}" for step in range(1, steps + 1))
        assert messages.count("The job has successfully completed") == 1
    assert len(database.rows("SELECT id FROM files WHERE purpose = 'fine-tune-results'")) == count
    database.close()
