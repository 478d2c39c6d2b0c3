"""Files that are larger than the memory they may take: read, checked and made into examples in a bounded part of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORK = r"""
import json, sys
from pathlib import Path
from veneer.data import dataset
from veneer.data.check import check_files
from veneer.data.chat.render import Renderer
from tests.tiny import tiny_tokenizer

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

dataset._SPILL = 4 << 20
path, what = Path(sys.argv[1]), sys.argv[2]
renderer = Renderer(tiny_tokenizer())
list(renderer.render_many(dataset.Rows(path.with_name("few.jsonl"))))
open("/proc/self/clear_refs", "w").write("5")
held = status("VmRSS")
if what == "check":
    report = check_files([path], renderer)
    count, tokens = report.load.examples, report.load.tokens
else:
    examples, report = dataset.load_examples([path], renderer)
    part = dataset.Selected(examples, range(0, len(examples), 2))
    assert part[len(part) - 1] == examples[2 * len(part) - 2]
    count, tokens = report.examples, report.tokens
print(json.dumps([count, tokens, status("VmHWM") - held]))
"""


def write_rows(path: Path, count: int) -> int:
    """Rows of two thousand letters and more, no two alike; returns the file's size."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            words = f"row {i} of many words and numbers " * 66
            turns = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": words}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path.stat().st_size


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are told by Linux only")
@pytest.mark.parametrize("what", ["check", "load"])
def test_a_file_takes_a_bounded_part_of_memory(what: str, tmp_path: Path) -> None:
    """A file of 100 MB (800 MB as tokens with weights) is checked, or loaded, in less than 60 MB."""
    write_rows(tmp_path / "few.jsonl", 300)
    size = write_rows(tmp_path / "many.jsonl", 47_000)
    assert size > 100_000_000
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(tmp_path / "many.jsonl"), what], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    count, tokens, memory = json.loads(done.stdout)
    print(f"{what}: {size / 1e6:,.0f} MB, {tokens:,} tokens, {memory / 1e6:.0f} MB of memory")
    assert count == 47_000
    assert memory < 60 << 20
