"""Time from the command to the first step: ``veneer train`` on the cached embedded base.

    python -m bench.first_step --runs 3

Writes 400 demonstration rows, starts the command several times, and reads from the run's files when the first step begins and ends. Bound:
8 s on two cores until it begins.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from veneer.data.stdlib_docs import stdlib_pairs

BOUND = 8.0


def main() -> None:
    """Measure and print. Exits 1 if the median is above the bound."""
    parser = argparse.ArgumentParser(prog="bench.first_step", description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("options", nargs="*", help="more options of veneer train, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        pairs = stdlib_pairs()[0][: args.rows]
        rows.write_text("".join(json.dumps({"messages": pair["messages"]}) + "\n" for pair in pairs), encoding="utf-8")
        seen = [_once(rows, Path(folder, f"run{i}"), args.options) for i in range(args.runs)]
    for what, times in zip(("begins", "is taken"), zip(*seen, strict=True), strict=True):
        each = ", ".join(f"{seconds:.2f}" for seconds in times)
        print(f"the first step {what} after {each} s; median {statistics.median(times):.2f}")
    sys.exit(statistics.median(begins for begins, _ in seen) > BOUND)


def _once(rows: Path, out: Path, options: list[str]) -> tuple[float, float]:
    """Seconds until the run starts its first step, and until it has taken it."""
    command = [sys.executable, "-m", "veneer", "train", str(rows), "--base", "smollm2-135m", "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--steps", "1", *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    begins = _when(process, out / "events.jsonl", '"started"') - began
    taken = _when(process, out / "metrics" / f"{out.name}.jsonl", '"loss"') - began
    process.communicate()
    return begins, taken


def _when(process: subprocess.Popen[bytes], path: Path, word: str) -> float:
    """The time at which ``word`` appears in a file."""
    while not (path.is_file() and word in path.read_text(encoding="utf-8")):
        if process.poll() not in (None, 0):
            raise SystemExit(f"veneer train failed: {process.communicate()[1].decode()[-2000:]}")
        time.sleep(0.01)
    return time.perf_counter()


if __name__ == "__main__":
    main()
