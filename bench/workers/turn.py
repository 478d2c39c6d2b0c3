"""A contestant's side of the protocol: it takes a step on request and answers with its loss and time.

    for rows in turn:              waits without spinning; the clock starts when the rows are returned
        turn.done(loss)            the clock stops

One JSON object per line in both directions. Output of libraries goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
"""Rows of a step: {"ids": [...], "weights": [...]}; weights[i] is the weight of predicting ids[i]."""


class Turn:
    """One worker's protocol."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._next = 0
        self._began = 0.0
        self._baseline = 0
        self.figures: dict[str, Any] = {}
        """Extra values, sent with the next answer."""

    @property
    def steps(self) -> list[Rows]:
        """All steps of the workload; a run cycles through them."""
        return list(self.spec["steps"])

    def loaded(self, model: Any) -> None:
        """Call after imports and loading the base: memory allocated from here on belongs to the step."""
        for parameter in model.parameters():
            parameter.detach().view(-1)[::512].sum()  # mapped files count only once they are read
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self._baseline = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self._say(loaded=self._baseline)

    def __iter__(self) -> Iterator[Rows]:
        while True:
            yield self.next()

    def next(self) -> Rows:
        """Wait for a request; exit when the pipe is closed."""
        for line in sys.stdin:
            word = json.loads(line)["do"]
            if word == "step":
                rows = self.spec["steps"][self._next % len(self.spec["steps"])]
                self._next += 1
                self._began = time.perf_counter()
                return list(rows)
            if word == "memory":
                self._say(peak=_status("VmHWM") - self._baseline)
        self._out.flush()
        os._exit(0)  # skip the libraries' clean-up

    def done(self, loss: float) -> None:
        """End the step."""
        self._say(seconds=time.perf_counter() - self._began, loss=loss, **self.figures)
        self.figures = {}

    def _say(self, **answer: Any) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
