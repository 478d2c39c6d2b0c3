"""The application in a real Ray cluster, in a network namespace that has the loopback device only."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.project.source import ROOT
from tests.serve.api.made import Running, write_adapters
from tests.training.made import write_place
from tests.training.ray_nodes import inside, possible

from veneer import DoRA, LoRA

_SERVES = importlib.util.find_spec("grpc") is not None  # a part of ray[serve]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (_SERVES and possible()), reason="needs Ray Serve and a network namespace")
def test_replicas_in_a_cluster(tmp_path: Path) -> None:
    """The answers of one server, requests of an adapter kept together, and a replica that is killed costs only its streams."""
    write_place(tmp_path)
    write_adapters(tmp_path / "base", tmp_path / "adapters", {"sql": LoRA(r=2), "style": DoRA(r=3)})
    running = Running(tmp_path / "base", tmp_path / "one", tmp_path / "adapters")
    expected = {
        model: running.client()
        .completions.create(model=model, prompt="The rain", max_tokens=8, temperature=0)
        .choices[0]
        .text
        for model in ("base", "sql", "style")
    }
    running.close()
    assert len(set(expected.values())) == 3
    (tmp_path / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        inside([sys.executable, "-m", "tests.serve.replicas.beside_ray", str(tmp_path)], nodes=1),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stdout + done.stderr
    print(done.stdout)
