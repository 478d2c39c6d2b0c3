"""A limit on the time of Python code that cannot be trusted to end, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _Expired(BaseException):
    """Raised inside the code. No ``except Exception`` on the way stops it."""


class _Interrupt:
    """Raises `_Expired` in a thread, unless it is stopped first."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._stopped = self._sent = False

    def send(self) -> None:
        """Interrupt the thread that made this; called in another one."""
        with self._lock:
            if not self._stopped:
                self._sent = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_Expired))

    def stop(self) -> bool:
        """Send nothing from now on; returns whether it was sent."""
        with self._lock:
            self._stopped = True
            return self._sent


def within(seconds: float, error: Exception, work: Callable[[], T]) -> T:
    """The result of ``work``, which is interrupted after some seconds.

    The interrupt comes between two steps of the interpreter, so a single long call into C is not cut short.

    Raises:
        Exception: ``error`` where the time is over, otherwise what ``work`` raises.
    """
    interrupt, arrived = _Interrupt(), False
    timer = threading.Timer(seconds, interrupt.send)
    timer.daemon = True
    try:
        timer.start()
        try:
            return work()
        except _Expired:
            arrived = True
            raise
        finally:
            timer.cancel()
            while interrupt.stop() and not arrived:  # it is on its way, and must not come later
                time.sleep(0)
    except _Expired:
        raise error from None
