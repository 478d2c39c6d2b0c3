"""The demo on the embedded model: what it shows, what it leaves, and what it promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.cli.main import main

SHOWN = (
    r"The data\n-+\nTraining: [\d,]+ functions from \d+ modules of the standard library of Python 3\.\d+\. Held out: \d+ functions",
    r"The base\n-+\nSmolLM2-135M-Instruct, 134\.5 million parameters in \w+, frozen\.",
    r"\[\[\w.*<\|im_end\|>\]\]",
    r"trained \d+ of \d+ tokens",
    r"Training\n-+\n",
    r"held-out loss of the base +\d\.\d+\nheld-out loss of the adapter +\d\.\d+ +\(-?\d+ % lower\)",
    r"difference [+-]\d\.\d+ \(95 % interval [+-]\d\.\d+ to [+-]\d\.\d+, paired over \d+ functions",
    r"  base     \S.*\n  adapter  \S.*\n  truth    \S",
    r"The adapter has 19\.\d MB, \d\.\d % of the \d+ MB of the base",
    r"changes the logits by at most \S+ in fp32",
    r"The demo took \d+\.\d minutes and at most \d\.\d\d GB of memory",
    r"Next steps\n-+\n(?:  source \S+\n)?  veneer chat ",
)


@pytest.mark.real
@pytest.mark.timeout(600)
def test_it_shows_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data, rows with their trained tokens, losses with an interval, answers side by side, sizes, the merge, time, and what to do next."""
    assert main(["demo", "--out", str(tmp_path / "demo"), "--steps", "2", "--examples", "6"]) == 0
    out = capsys.readouterr().out
    assert [pattern for pattern in SHOWN if not re.search(pattern, out)] == []
    assert out.count("  truth ") == 3
    for folder in ("adapter", "best"):
        assert (tmp_path / "demo" / folder / "adapter_config.json").is_file()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_learns_what_it_promises(tmp_path: Path) -> None:
    """The held-out loss falls by 25 % or more, its interval is clear of zero, and the process stays below 2.5 GB."""
    command = [sys.executable, "-m", "veneer", "demo", "--out", str(tmp_path / "demo")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    losses = [float(x) for x in re.findall(r"held-out loss of the (?:base|adapter) +(\d\.\d+)", out)]
    assert losses[1] <= 0.75 * losses[0]
    (high,) = re.findall(r"95 % interval \S+ to (\S+),", out)
    assert float(high) < 0
    (memory,) = re.findall(r"at most (\d\.\d\d) GB", out)
    assert float(memory) < 2.5
    (apart,) = re.findall(r"changes the logits by at most (\S+) in fp32", out)
    assert float(apart) < 1e-3
    lines = [json.loads(line) for line in (tmp_path / "demo" / "metrics" / "docstrings.jsonl").read_text().splitlines()]
    assert max(line.get("memory_gb", 0) for line in lines) < 2.5
