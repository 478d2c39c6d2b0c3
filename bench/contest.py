"""Run contestants in separate processes, in rounds in which each takes one step.

Contestants share no memory or threads, and sleep while they wait. The order rotates from round to round. Before the rounds each runs
some steps alone: its losses must equal those of the first contestant, and its peak memory in these steps, minus imports and the loaded
base, is recorded.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import Case, Contestant

_TOLERANCE = {"float32": 2e-3, "bfloat16": 1.5e-2}
_SHIPPED = 3e-2
"""Relative difference of losses that counts as equal. Dropout and other dtypes are compared at the first step, where B is 0."""
_PAUSE = 0.05
"""Seconds after which the threads of the last contestant are asleep."""


class Disagreement(SystemExit):
    """Losses that should be equal are not."""


class Gone(RuntimeError):
    """A contestant's process ended."""


@dataclass
class Result:
    """Results of one contestant: losses of its first steps, peak bytes, seconds of each round, extra values of the last step."""

    contestant: Contestant
    losses: list[float] = field(default_factory=list)
    memory: int = 0
    seconds: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


class Worker:
    """One contestant's process."""

    def __init__(self, python: Path, spec: Path, log: Path) -> None:
        self.log = log
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [str(python), "-m", "bench.workers.serve", str(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        self.baseline = int(self._answer()["loaded"])

    def step(self) -> dict[str, Any]:
        """Take a step."""
        return self._ask("step")

    def memory(self) -> int:
        """Peak bytes so far, minus imports and the base."""
        return int(self._ask("memory")["peak"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # a process that ended gives no answer
            self.process.stdin.write(json.dumps({"do": word}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise Gone(f"its process ended; the end of {self.log}:\n{tail}")
        return dict(json.loads(line))


def compete(
    case: Case, specs: dict[str, Path], pythons: dict[str, Path], *, rounds: int, checks: int, seconds: float
) -> list[Result]:
    """Start all contestants, check their losses, and run rounds while the next one would end within ``seconds`` in total.

    Raises Disagreement before the first round.
    """
    began = time.perf_counter()
    workers: dict[str, Worker] = {}
    results = {one.name: Result(one) for one in case.contestants}
    try:
        for one in case.contestants:
            result = results[one.name]
            try:
                workers[one.name] = Worker(pythons[one.name], specs[one.name], specs[one.name].with_suffix(".log"))
                for _ in range(checks):
                    result.losses.append(float(workers[one.name].step()["loss"]))
                result.memory = workers[one.name].memory()
            except Gone as error:  # compare the others
                print(f"  {one.name} is left out: {error}", flush=True)
                del results[one.name]
                continue
            if one.engine != "gemms":
                print(f"  {one.name}: losses {', '.join(f'{loss:.4f}' for loss in result.losses)}", flush=True)
            _compare(next(iter(results.values())), result)
        for number in range(rounds):
            before = time.perf_counter()
            order = list(results)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                time.sleep(_PAUSE)
                answer = _step(workers[name], name, results)
                if answer is None:
                    continue
                results[name].seconds.append(float(answer.get("floor", answer["seconds"])))
                results[name].more = {key: answer[key] for key in answer if key not in ("seconds", "loss")}
            now = time.perf_counter()
            if now - began + 1.1 * (now - before) > seconds:
                break
    finally:
        for worker in workers.values():
            worker.close()
    return list(results.values())


def _step(worker: Worker, name: str, results: dict[str, Result]) -> dict[str, Any] | None:
    """A step of a round. A contestant whose process ends (usually for memory) is left out from then on."""
    try:
        return worker.step()
    except Gone as error:
        print(f"  {name} is left out: {error}", flush=True)
        del results[name]
        return None


def _compare(first: Result, other: Result) -> None:
    for step in range(min(other.contestant.alike, len(other.losses))):
        one, two = first.losses[step], other.losses[step]
        same = first.contestant.dtype == other.contestant.dtype and not other.contestant.form
        bound = _TOLERANCE[other.contestant.dtype] if same else _SHIPPED
        if not abs(one - two) <= bound * max(1.0, abs(one)):
            raise Disagreement(
                f"step {step + 1}: the loss of {other.contestant.name} is {two:.5f}, that of {first.contestant.name} {one:.5f}; "
                "they do not compute the same result, so their times are not compared"
            )


def spec_of(one: Contestant, *, base: Path, adapter: Path | None, steps: Any, threads: int) -> dict[str, Any]:
    """The specification that a contestant's process reads at its start."""
    return {
        **asdict(one),
        "base": str(base),
        "adapter": None if adapter is None else str(adapter),
        "steps": steps,
        "threads": threads,
    }
