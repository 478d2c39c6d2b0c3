"""OpenMP's threads wait shortly while the threads of this process stand in line for processors, and long again afterwards."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from veneer.kernels import waiting_threads
from veneer.kernels.waiting_threads import WaitingThreads

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU OpenMP and /proc")


class Clock:
    """Seconds that pass, and seconds in line, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.in_line = 100.0
        monkeypatch.setattr(waiting_threads.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(waiting_threads, "_seconds_in_line", lambda: self.in_line)

    def pass_by(self, seconds: float, in_line: float) -> None:
        """Advance both."""
        self.now += seconds
        self.in_line += in_line


def threads() -> int:
    """Threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_threads_wait_shortly_beside_a_busy_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle threads are started while others stand in line, and end when they do not."""
    torch.ones(10).sum()
    clock, before = Clock(monkeypatch), threads()
    waiting = WaitingThreads()
    clock.pass_by(2.0, in_line=0.2)
    waiting.look()
    assert not waiting.short
    clock.pass_by(2.0, in_line=1.2)
    waiting.look()
    assert waiting.short
    assert threads() == before + 1 + len(
        os.sched_getaffinity(0)
    )  # more than there are processors, which is what shortens the wait
    clock.pass_by(2.0, in_line=0.4)  # between the two bounds nothing changes
    waiting.look()
    assert waiting.short
    clock.pass_by(2.0, in_line=0.0)
    waiting.look()
    assert not waiting.short


def test_looks_are_at_least_a_second_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short step is not measured alone."""
    clock = Clock(monkeypatch)
    waiting = WaitingThreads()
    clock.pass_by(0.5, in_line=0.5)
    waiting.look()
    assert not waiting.short
    clock.pass_by(0.6, in_line=0.5)
    waiting.look()
    assert waiting.short
    waiting.end()
    assert not waiting.short


def test_other_copies_of_the_library_do_not_matter() -> None:
    """The library of torch is found where another package has loaded its own copy."""
    pytest.importorskip("sklearn.metrics")
    library = waiting_threads._openmp()
    assert library is not None and Path(torch.__file__).parent.parent in Path(library._name).parents
    assert "sklearn" not in library._name and "scikit" not in library._name


def test_the_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy in the environment is not overridden."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    clock = Clock(monkeypatch)
    waiting = WaitingThreads()
    clock.pass_by(2.0, in_line=2.0)
    waiting.look()
    assert not waiting.short


def test_time_in_line_is_read() -> None:
    """Linux reports the seconds."""
    seconds = waiting_threads._seconds_in_line()
    assert seconds is not None
    assert seconds >= 0.0
