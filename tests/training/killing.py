"""A warm process that forks runs and kills them: importing torch for each would take longer than a run.

    python -m tests.training.killing BASE       one JSON request a line on its input, one answer a line on its output

A request: {"options": ..., "after": seconds or null, "point": name or null, "time": n, "how": "raise" | "exit" | "kill"}. The fork runs
``train(options)`` on the base in memory; it is killed (SIGKILL) after so many seconds, or dies of itself at the n-th time that the commit
protocol passes a named point. The answer: {"code": exit code, negative for a signal, "seconds": ...}.

``Killer`` is the other end of the line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Killer:
    """Starts and kills runs on one base."""

    def __init__(self, place: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.killing", str(place / "base")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self.rng = random.Random(0)
        self.kills = self.landed = 0

    def run(self, options: dict[str, Any], **fault: Any) -> tuple[int, float]:
        """One run: its exit code and how long it took."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"options": options, **fault}, default=str) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["seconds"]

    def to_the_end(self, options: dict[str, Any], seconds: float, again: float = 0.3) -> None:
        """A run that is killed at a random time, and gone on with, killed again with probability ``again`` each time, until it ends."""
        after = self.rng.uniform(0, seconds)
        self.kills += 1
        code, _ = self.run(options, after=after)
        self.landed += code == -signal.SIGKILL
        while code == -signal.SIGKILL:
            after = self.rng.uniform(0, seconds) if self.rng.random() < again else None
            code, _ = self.run(options, after=after)
        assert code == 0, code

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def litter(out: Path) -> list[str]:
    """What a run must not leave behind: anything written aside and not in its place."""
    return [str(path) for path in out.rglob("*") if ".tmp-" in path.name or path.name.startswith(".unfinished")]


def serve(folder: str) -> None:
    """Answer requests until the input ends."""
    import torch

    torch.set_num_threads(1)
    from veneer.models.load import load_base
    from veneer.training import train  # noqa: F401  (imported here, so that forks need not)

    base = load_base(folder, dtype="float32")
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_a_run(request, base)
        code = _wait(child, request.get("after"))
        print(json.dumps({"code": code, "seconds": time.monotonic() - began}), flush=True)


def _wait(child: int, after: float | None) -> int:
    if after is not None:
        end = time.monotonic() + after
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(min(0.002, max(0.0, end - time.monotonic())))
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _be_a_run(request: dict[str, Any], base: Any) -> None:
    from veneer.checkpoints import commit
    from veneer.training import train
    from veneer.training.run.console import Console

    left = request.get("time", 1)

    def at(point: str) -> None:
        nonlocal left
        if point != request.get("point"):
            return
        left -= 1
        if left == 0:
            {"raise": lambda: 1 / 0, "exit": lambda: os._exit(9), "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}[
                request["how"]
            ]()

    commit.at = at  # type: ignore[assignment]
    code = 7
    try:
        train(request["options"], base=base, console=Console(quiet=True))
        code = 0
    except ZeroDivisionError:
        code = 3
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
