"""A limit on the time that Python code takes which cannot be trusted to end, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType


class _Expired(BaseException):
    """Raised inside the code. No ``except Exception`` on the way stops it."""


class TimeLimit:
    """A context whose body is interrupted after a time; then it raises an error.

    The interrupt comes between two steps of the interpreter, so a single long call into C is not cut short.

    Args:
        seconds: longest time.
        error: raised when it is over.
    """

    def __init__(self, seconds: float, error: Exception) -> None:
        self._error = error
        self._timer = threading.Timer(seconds, self._interrupt)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._thread = 0
        self._over = self._fired = False

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._timer.start()

    def _interrupt(self) -> None:  # in the timer's thread
        with self._lock:
            if not self._over:
                self._fired = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_Expired))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._lock:
                self._over = True
            self._timer.cancel()
            while self._fired and kind is not _Expired:  # it is on its way, and must not come later
                time.sleep(0)
        except _Expired:
            pass
        if self._fired:
            raise self._error from None
