"""Starts a command in several processes on this machine, as torchrun would, and ends them together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from veneer.errors import ConfigError

GRACE = 10.0
"""Seconds that the other processes have to end by themselves once one has."""
_POLL = 0.05


def launched() -> bool:
    """Tell if a launcher, this one or torchrun, has started this process."""
    return "WORLD_SIZE" in os.environ


def launch(words: Sequence[str], processes: int, threads: int | None) -> int:
    """Run ``veneer WORDS`` in so many processes; returns the exit code.

    The first one prints. If one is killed or fails, the others are ended within ``GRACE`` seconds and a line says so.

    Raises:
        ConfigError: there are more processes than cores.
    """
    if processes > cores():
        raise ConfigError(
            f"processes: {processes} do not fit this machine, which has {cores()} core{'s' if cores() > 1 else ''}; give at most one "
            "for each core, or for each GPU"
        )
    port = _free_port()
    return _Family([_start(words, rank, processes, port, threads) for rank in range(processes)]).wait()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _start(words: Sequence[str], rank: int, size: int, port: int, threads: int | None) -> subprocess.Popen[bytes]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in {**place, **group}.items()}}
    if threads is None:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // size)))
    stdin = None if rank == 0 else subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "veneer", *words], env=environment, stdin=stdin)


class _Family:
    """The processes of one run."""

    def __init__(self, children: list[subprocess.Popen[bytes]]) -> None:
        self.children = children

    def wait(self) -> int:
        """Wait for all; returns the first process's exit code, or that of the one that ended the run."""
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while any(child.poll() is None for child in self.children):
                if any(child.poll() for child in self.children):
                    return self._end()
                time.sleep(_POLL)
            return next((code for child in self.children if (code := child.returncode)), 0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """A terminal sends Ctrl-C to all of them; anything else the first process must be told, which decides for all."""
        if number != signal.SIGINT and self.children[0].poll() is None:
            self.children[0].send_signal(number)

    def _end(self) -> int:
        killed = self._killed()
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(child.poll() is None for child in self.children):
            time.sleep(_POLL)
            killed = self._killed() if killed is None else killed
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()
        if killed is None:
            return next((child.returncode for child in self.children if child.returncode > 0), 1)
        name = signal.Signals(-self.children[killed].returncode).name
        print(
            f"veneer: process {killed} of {len(self.children)} was ended by {name}, so the run has ended; run the same command to resume "
            "from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return 1

    def _killed(self) -> int | None:
        """The first process that a signal has ended."""
        codes = [child.poll() for child in self.children]
        return next((rank for rank, code in enumerate(codes) if code is not None and code < 0), None)
