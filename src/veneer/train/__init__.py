"""Training: two verbs (``forward_backward``, ``optim_step``), jobs that own everything but the base, and the run around them.

``veneer.train(config)`` is the function and ``veneer.train.step`` a module of this room: Python keeps one object under the name, so the
room itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from veneer.train.result import JobResult, RunResult
from veneer.train.run import train

__all__ = ["JobResult", "RunResult", "train"]


class _Room(ModuleType):
    """This package, callable as its main function."""

    def __call__(self, *args: Any, **options: Any) -> RunResult:
        return train(*args, **options)


sys.modules[__name__].__class__ = _Room
