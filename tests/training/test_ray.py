"""Whole runs on a Ray cluster of two nodes on this machine, in a network namespace of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.project.source import ROOT
from tests.training.made import options
from tests.training.ray_nodes import apart, inside, possible
from tests.training.test_cluster import adapters

from veneer.config import TrainOptions, plain, to_yaml
from veneer.training import train
from veneer.training.run.console import Console

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not possible(), reason="needs Ray and a network namespace"),
]


def write_sweep(place: Path, **others: Any) -> Path:
    """24 jobs of a sweep, in turn."""
    grid = {"r": [1, 2, 4], "learning_rate": [1e-3, 1e-2], "lora_dropout": [0.0, 0.1], "method": ["lora", "dora"]}
    given = options(place, Path("unused"), tokens_per_shared_pass=0, threads=1, save_every=2, **others)
    path = place / "sweep.yaml"
    path.write_text(
        to_yaml(
            {
                **plain(
                    TrainOptions(
                        **{k: v for k, v in given.items() if k not in ("r", "learning_rate", "lora_dropout", "out")}
                    )
                ),
                "sweep": grid,
            }
        )
    )
    return path


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command beside a cluster of two nodes, which end with this context."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    line = inside([sys.executable, "-m", "veneer", *words])
    piped: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(line, cwd=ROOT, env=environment, **piped) as process:
        try:
            yield process
        finally:
            process.kill()


def workers(out: Path) -> dict[int, int]:
    """{process: part} of the workers that hold the lock of a part; a lock names its process as the cluster's namespace does."""
    locks = {}
    for lock in (out / "parts").glob("*/.lock"):
        text = lock.read_text(encoding="ascii").strip()
        if text.isdigit():
            locks[text] = lock
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            inner = next(line.split()[-1] for line in status.read_text().splitlines() if line.startswith("NSpid:"))
            if inner in locks and any(file.samefile(locks[inner]) for file in (status.parent / "fd").iterdir()):
                found[int(status.parent.name)] = int(locks[inner].parent.name)
        except (OSError, StopIteration):  # a process that has ended
            continue
    return found


def test_24_jobs_on_two_workers(place: Path, tmp_path: Path) -> None:
    """The adapters have the bytes of the same sweep without Ray."""
    sweep = write_sweep(place, steps=6)
    train(str(sweep), out=tmp_path / "alone" / "run", console=Console(quiet=True))
    with started(["train", str(sweep), "--out", str(tmp_path / "ray" / "run"), "--cluster", "auto"]) as ran:
        said, _ = ran.communicate(timeout=900)
    assert ran.returncode == 0, said
    assert "24 jobs in 4 parts on 2 workers" in said
    alone = adapters(tmp_path / "alone" / "run")
    assert len(alone) == 24 and adapters(tmp_path / "ray" / "run") == alone


def test_a_killed_worker(place: Path, tmp_path: Path) -> None:
    """SIGKILL of a worker costs the steps since its last checkpoint: another one goes on from there, to the same bytes."""
    sweep = write_sweep(place, steps=40)
    out = tmp_path / "ray" / "run"
    with started(["train", str(sweep), "--out", str(out), "--cluster", "127.0.0.1:6390"]) as ran:
        killed, until = 0, time.monotonic() + 600
        while not killed and time.monotonic() < until and ran.poll() is None:
            for process, part in workers(out).items():
                if list((out / "parts" / f"{part:03d}" / "checkpoints").glob("step-*/state.json")):
                    os.kill(process, signal.SIGKILL)
                    killed = part
                    break
            time.sleep(0.05)
        said, _ = ran.communicate(timeout=900)
    assert ran.returncode == 0 and killed, said
    lines = (out / "parts" / f"{killed:03d}" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    begun = [event["round"] for event in map(json.loads, lines) if event["event"] == "started"]
    assert len(begun) == 2 and begun[0] == 0 and begun[1] >= 2
    train(str(sweep), out=tmp_path / "alone" / "run", console=Console(quiet=True))
    assert adapters(out) == adapters(tmp_path / "alone" / "run")


def test_no_cluster_on_this_machine(place: Path, tmp_path: Path) -> None:
    """With ``auto`` and no cluster, one sentence says how to start one; nothing is written."""
    sweep = write_sweep(place, steps=1)
    words = [sys.executable, "-m", "veneer", "train", str(sweep), "--out", str(tmp_path / "run"), "--cluster", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "RAY_TMPDIR": str(tmp_path)}
    done = subprocess.run(
        apart(words), cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode != 0 and "no Ray cluster answers on this machine" in done.stderr
    assert done.stderr.count("\n") <= 3 and not (tmp_path / "run").exists()
