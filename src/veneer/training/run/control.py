"""Requests to a run: signals, and from other processes ``control.json``.

``control.json`` in a run's folder maps names of jobs to changes.

    {"sql": "pause", "style": "cancel"}         or "resume"; "*" means all jobs

The run reads the file between rounds, applies the requests, saves its state, and only then deletes the file, so that no request is lost
if the process dies. A run that is not active finds the file at its next start. ``ask`` writes a file for each request, whose name has
the time: nothing is written over, whoever asks, and the last request of a job counts.
"""

from __future__ import annotations

import json
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import get_args

from veneer._files import replace_text
from veneer.errors import TrainingError
from veneer.training.loop.trainer import Request, Verb

FILE = "control.json"
_TIMED = "control-*.json"
_VERBS: tuple[Verb, ...] = get_args(Verb)


def ask(out: Path, job: str, verb: Verb) -> None:
    """Add a request to a run's folder."""
    replace_text(_timed(out), json.dumps({job: verb}))


def _timed(out: Path) -> Path:
    """A new name for requests, behind all earlier ones."""
    return out / f"control-{time.time_ns():020}-{secrets.token_hex(2)}.json"


@contextmanager
def stop_signals(stop: Callable[[], None], stopped: Callable[[], bool]) -> Iterator[None]:
    """Inside this context, Ctrl-C or SIGTERM calls ``stop``, or raises KeyboardInterrupt if the run is ``stopped`` already.

    Outside of the main thread, which alone can handle signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stopped():
            raise KeyboardInterrupt
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Control:
    """The requests in one run's folder."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._taken: list[Path] = []

    def take(self, jobs: Sequence[str], say: Callable[[str], None]) -> list[Request]:
        """The requests that are not yet forgotten, in order.

        Args:
            jobs: the jobs of the run.
            say: prints a line, for each file that cannot be read, or that names an unknown job or change. It is deleted.
        """
        found: list[Request] = []
        try:
            with suppress(FileNotFoundError):
                (self._out / FILE).replace(_timed(self._out))
            self._taken = sorted(self._out.glob(_TIMED))
            for path in self._taken:
                try:
                    found += _requests(path, jobs)
                except TrainingError as error:
                    say(f"{error}; the request is ignored")
                    path.unlink(missing_ok=True)
        except OSError as error:
            say(f"{FILE} cannot be taken: {error}")
        return found

    def forget(self) -> None:
        """Delete requests that are applied and saved."""
        for path in self._taken:
            path.unlink(missing_ok=True)
        self._taken = []


def _requests(path: Path, jobs: Sequence[str]) -> list[Request]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{FILE} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise TrainingError(f'{FILE}: expected {{"job": "{" | ".join(_VERBS)}"}}, found {type(found).__name__}')
    requests = []
    for name, verb in found.items():
        if verb not in _VERBS or (name != "*" and name not in jobs):
            raise TrainingError(
                f"{FILE} asks to {verb} {name!r}; the jobs are {', '.join(jobs)}, and the changes {', '.join(_VERBS)}"
            )
        requests += [Request(job, verb) for job in (jobs if name == "*" else [name])]
    return requests
