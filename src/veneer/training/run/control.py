"""Asking a run for a change from outside: ``control.json`` in its folder, a job's name and what is to become of it.

    {"sql": "pause", "style": "cancel"}         or "resume"; "*" means every job

The run looks for the file between two rounds, does what it says, saves its state and only then forgets it, so that a request is not
lost with a process that dies. A run that is not being worked on finds it at its next start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from veneer._files import replace_text
from veneer.errors import TrainingError
from veneer.training.loop.trainer import Request, Verb

FILE = "control.json"
_TAKEN = "control.taken.json"
_VERBS: tuple[Verb, ...] = get_args(Verb)


def ask(out: Path, job: str, verb: Verb) -> None:
    """Leave a request in a run's folder, beside those that wait there."""
    try:
        waiting = json.loads((out / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        waiting = {}
    replace_text(out / FILE, json.dumps({**waiting, job: verb}))


class Control:
    """The requests in one run's folder."""

    def __init__(self, out: Path) -> None:
        self._file = out / FILE
        self._taken = out / _TAKEN

    def take(self, jobs: Sequence[str]) -> list[Request]:
        """What is asked for, and not yet forgotten.

        Raises TrainingError, once, for a file that cannot be read or asks for what there is not.
        """
        if self._file.exists():
            self._file.replace(self._taken)
        if not self._taken.exists():
            return []
        try:
            return _requests(self._taken, jobs)
        except TrainingError:
            self.forget()
            raise

    def forget(self) -> None:
        """What was taken is done, and saved."""
        self._taken.unlink(missing_ok=True)


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
                f"{FILE} asks to {verb} {name!r}; jobs are {', '.join(jobs)}, and what can be asked for is {', '.join(_VERBS)}"
            )
        requests += [Request(job, verb) for job in (jobs if name == "*" else [name])]
    return requests
