"""Turns of an engine and of other work, such as training steps, with one model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ModelTurns:
    """The lock on a model. Steps of the engine and other work hold it one after another."""

    def __init__(self, share: float) -> None:
        """``share``: part of the time that other work may take while the engine has requests."""
        self._share = min(max(share, 1e-3), 1.0)
        self._lock = threading.Lock()
        self._one_other = threading.Semaphore(1)
        self._paused_until = 0.0
        self._waiting = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold the model for a step of the engine."""
        with self._lock:
            yield

    def give_way(self) -> None:
        """Let other work that waits take the lock: a lock does not go to a waiting thread if this one takes it again at once."""
        if self._waiting:
            time.sleep(0.0002)

    @contextmanager
    def other_work(self, busy: Callable[[], bool]) -> Iterator[None]:
        """Hold the model for other work, after a pause that keeps to the share while the engine is ``busy``."""
        with self._one_other:
            while busy() and time.monotonic() < self._paused_until:
                time.sleep(min(0.005, max(0.0, self._paused_until - time.monotonic())))
            self._waiting = True
            with self._lock:
                self._waiting = False
                begun = time.monotonic()
                try:
                    yield
                finally:
                    ended = time.monotonic()
                    self._paused_until = ended + (ended - begun) * (1 - self._share) / self._share
