"""Forks of this process that train together: importing torch for each would take longer than a run."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.cli._launch import _free_port
from veneer.training.parallel.processes import Processes, join

Work = Callable[[Processes], Any]


class Forks:
    """One group of forks; ``results`` are what their work returned (as JSON), ``codes`` their exit codes, negative for a signal."""

    def __init__(self, size: int, work: Callable[[int], Any], *, local: int | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.codes: list[int | None] = [None] * size
        port = _free_port()
        self.children = [self._fork(rank, size, port, work, local or size) for rank in range(size)]

    def _fork(self, rank: int, size: int, port: int, work: Callable[[int], Any], local: int) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(local))
            sys.stderr = (self.folder / f"{rank}.err").open("w")
            found = work(rank)
            (self.folder / f"{rank}.json").write_text(json.dumps(found))
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 60.0) -> list[int]:
        """Wait for all; returns their exit codes. Those that take longer are killed."""
        deadline = time.monotonic() + seconds
        while None in self.codes:
            for rank, child in enumerate(self.children):
                if self.codes[rank] is None:
                    done, status = os.waitpid(child, os.WNOHANG)
                    if done:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
                    elif time.monotonic() > deadline:
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        return [code for code in self.codes if code is not None]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one of them, if it still runs."""
        if self.codes[rank] is not None:
            return
        done, status = os.waitpid(self.children[rank], os.WNOHANG)
        if done:
            self.codes[rank] = os.waitstatus_to_exitcode(status)
        else:
            os.kill(self.children[rank], number)

    def results(self) -> list[Any]:
        """What each one's work returned."""
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(len(self.children))]

    def errors(self) -> list[str]:
        """What each one wrote to its standard error."""
        return [(self.folder / f"{rank}.err").read_text() for rank in range(len(self.children))]


def together(size: int, work: Work, *, minutes: float = 1.0) -> list[Any]:
    """Do the same work in so many processes that have joined; returns what each found. All must succeed."""

    def joined(rank: int) -> Any:
        with join(1, "cpu", minutes) as processes:
            return work(processes)

    forks = Forks(size, joined)
    codes = forks.wait()
    assert codes == [0] * size, forks.errors()
    return forks.results()
