"""Runs in forks of this process, killed at a time or at a point of the commit protocol: importing torch for each would take longer.

``Killer.run(options)`` forks ``train(options)`` on a base in memory. With ``after`` it is killed (SIGKILL) after so many seconds; with
``point``, ``time`` and ``how`` ("raise" or "kill") it dies of itself at the n-th time that the commit protocol passes that point.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from veneer.checkpoints import commit
from veneer.models.load import Base
from veneer.training import train
from veneer.training.run.console import Console


class Killer:
    """Starts and kills runs on one base."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self.rng = random.Random(0)
        self.kills = self.landed = 0

    def run(self, options: dict[str, Any], *, after: float | None = None, **fault: Any) -> tuple[int, float]:
        """One run: its exit code, negative for a signal, and the seconds that it took."""
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_a_run(options, self._base, **fault)
        return _wait(child, after), time.monotonic() - began

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


def litter(out: Path) -> list[str]:
    """What a run must not leave behind: anything written aside and not in its place."""
    return [str(path) for path in out.rglob("*") if ".tmp-" in path.name or path.name.startswith(".unfinished")]


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


def _be_a_run(
    options: dict[str, Any], base: Base, *, point: str | None = None, time: int = 1, how: str = "kill"
) -> None:
    left = time

    def at(passed: str) -> None:
        nonlocal left
        left -= passed == point
        if passed == point and left == 0:
            {"raise": lambda: 1 / 0, "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}[how]()

    commit.at = at  # type: ignore[assignment]
    code = 7
    try:
        train(options, base=base, console=Console(quiet=True))
        code = 0
    except ZeroDivisionError:
        code = 3
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)
