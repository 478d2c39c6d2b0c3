"""A training step beside a busy process, as a ratio to the step alone.

    python -m bench.busy_neighbour                 # the uniform workload: 8 x 128 tokens, r=8, bf16, two threads
    python -m bench.busy_neighbour --rounds 4

The neighbour is one process with one thread that computes without a pause. Rounds alternate: some steps alone, then as many beside the
neighbour, so that a drift of the machine meets both. Bound: 1.6. With two cores and three busy threads of equal priority the best that
can be reached is between 1.33 and 1.5.
"""

from __future__ import annotations

import veneer  # noqa: F401  # isort: skip  (before torch, as in a command: it limits how long OpenMP's threads spin)

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.bases import folder_of, vocabulary_of
from bench.cases import CASES
from bench.contest import spec_of
from bench.rows import steps_of

BOUND = 1.6
STEPS = 4


def main() -> None:
    """Measure and print; exit 1 if the ratio is above the bound."""
    parser = argparse.ArgumentParser(prog="bench.busy_neighbour", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "veneer-bench")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    case = CASES["uniform"]
    steps = steps_of(case.workload, STEPS, data=None, vocabulary=vocabulary_of(case.workload.base))
    base = folder_of(case.workload.base, args.out)
    spec = spec_of(case.contestants[0], base=base, adapter=None, steps=steps, threads=args.threads)
    ratio = measure(spec, args.rounds)
    sys.exit(ratio > BOUND)


def measure(spec: dict[str, Any], rounds: int) -> float:
    """Train in this process and time its steps alone and beside a neighbour."""
    import torch

    from bench.workers import veneer as worker

    torch.set_num_threads(spec["threads"])
    clock = Clock(spec["steps"], rounds)
    worker.run(spec, clock)  # type: ignore[arg-type]
    alone, beside = (statistics.median(times) for times in (clock.alone, clock.beside))
    ratio = statistics.median(b / a for a, b in zip(clock.alone, clock.beside, strict=True))
    print(f"alone {alone:.3f} s, beside a busy process {beside:.3f} s, ratio {ratio:.2f} (bound {BOUND})")
    return ratio


class Clock:
    """Stands for the pipe of ``bench.workers.turn``: hands out the steps and keeps their times."""

    def __init__(self, steps: list[Any], rounds: int) -> None:
        self.steps, self.rounds = steps, rounds
        self.alone: list[float] = []
        self.beside: list[float] = []
        self._times = self.alone
        self._began = 0.0

    def loaded(self, model: Any) -> None:
        """Nothing is measured of loading."""

    def __iter__(self) -> Iterator[Any]:
        for rows in self.steps[:3]:  # warm up; not kept
            self._times, self._began = [], time.perf_counter()
            yield rows
        for _ in range(self.rounds):
            yield from self._some(self.alone)
            with busy():
                yield from self._some(self.beside)

    def _some(self, times: list[float]) -> Iterator[Any]:
        self._times = times
        for rows in self.steps:
            self._began = time.perf_counter()
            yield rows

    def done(self, loss: float) -> None:
        """A step has ended."""
        self._times.append(time.perf_counter() - self._began)


@contextmanager
def busy() -> Iterator[None]:
    """A process with one thread that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.3)
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
