"""Two processes of one thread beside one process of two threads, on a CPU: the same steps of the same rows.

    python -m bench.processes --rounds 5
    python -m bench.processes --shard full --rows 64

Rows of one length, so that both have equal shares. The contestants run in turn, each from its own folder, and the losses are compared
first. Speed is tokens per second over the steps after the second, as the run's metrics have it. Bound: at least 0.95 of one process's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BOUND = 0.95
APART = 5e-3
"""Largest relative difference of the losses, in bf16."""
_SKIPPED = 2
_WORDS = ("alpha", "beta", "gamma", "delta", "river", "stone", "paper", "cloud")


def main() -> None:
    """Measure and print. Exits 1 if the ratio of the medians is below the bound."""
    parser = argparse.ArgumentParser(prog="bench.processes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16, help="examples in a step")
    parser.add_argument("--words", type=int, default=200, help="words in an example")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--shard", default="none", choices=("none", "full"))
    parser.add_argument("--sequence-parallel", type=int, default=1)
    args = parser.parse_args()
    speeds: dict[str, list[float]] = {"one": [], "two": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        texts = (
            " ".join(_WORDS[(i * i + row * i) % len(_WORDS)] for i in range(args.words)) for row in range(args.rows)
        )
        rows.write_text("".join(json.dumps({"text": f"{text}."}) + "\n" for text in texts), encoding="utf-8")
        for number in range(args.rounds):
            losses = {}
            for name in speeds:
                losses[name], speed = _run(args, rows, Path(folder, f"{name}{number}"), two=name == "two")
                speeds[name].append(speed)
            apart = max(abs(a - b) / abs(a) for a, b in zip(losses["one"], losses["two"], strict=True))
            if apart > APART:
                raise SystemExit(f"the losses are {apart:.1e} apart; the contestants do not train alike")
    for name, found in speeds.items():
        print(
            f"{name}: {', '.join(f'{speed:,.0f}' for speed in found)} tokens/s; median {statistics.median(found):,.0f}"
        )
    ratio = statistics.median(speeds["two"]) / statistics.median(speeds["one"])
    print(f"two processes of one thread: {ratio:.3f} of one process of two threads (bound {BOUND})")
    sys.exit(ratio < BOUND)


def _run(args: argparse.Namespace, rows: Path, out: Path, *, two: bool) -> tuple[list[float], float]:
    """The losses of a run, and its tokens per second."""
    command = [sys.executable, "-m", "veneer", "train", str(rows), "--base", args.base, "--out", str(out)]
    command += ["--steps", str(args.steps), "--batch-size", str(args.rows), "--device", "cpu", "--no-plan"]
    command += ["--learning-rate", "1e-4"]
    command += ["--tokens-per-pass", str(args.words * args.rows)] if args.sequence_parallel > 1 else []
    if two:
        command += ["--processes", "2", "--threads", "1", "--shard", args.shard]
        command += ["--sequence-parallel", str(args.sequence_parallel)]
    else:
        command += ["--threads", "2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics" / f"{out.name}.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    return [line["loss"] for line in steps], statistics.median(line["tokens_per_second"] for line in steps[_SKIPPED:])


if __name__ == "__main__":
    main()
