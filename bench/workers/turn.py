"""A contestant's side of the pipe: told when to take a step, it answers with the step's loss and time.

    for rows in turn:              waits without spinning; the clock starts when the rows are handed over
        turn.done(loss)            the clock stops

One JSON object a line each way. Whatever libraries print goes to the error stream.
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
"""Rows of a step: {"ids": [...], "weights": [...]}; weights[i] is that of predicting ids[i]."""


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
        """What an engine tells besides its loss, sent with the next answer."""

    @property
    def steps(self) -> list[Rows]:
        """All steps of the workload, over which a run goes in circles."""
        return list(self.spec["steps"])

    def loaded(self, model: Any) -> None:
        """Imports are through and the base is in memory: what is held from here on is the step's."""
        for parameter in model.parameters():
            parameter.detach().view(-1)[::512].sum()  # files that are mapped count once they are read
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self._baseline = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self._say(loaded=self._baseline)

    def __iter__(self) -> Iterator[Rows]:
        while True:
            yield self.next()

    def next(self) -> Rows:
        """Wait to be told to take a step; leave the process when told to."""
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
        os._exit(0)  # nobody waits for what libraries do at their end

    def done(self, loss: float) -> None:
        """The step is through."""
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
