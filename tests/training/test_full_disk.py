"""A disk that is full at one write, whichever it is: nothing damaged is ever taken, and the run ends as ever when there is room again."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints.helpers import newest
from tests.training.killing import litter
from tests.training.made import digest, options

from veneer.checkpoints import tensors as tensor_files
from veneer.checkpoints.commit import candidates, verified
from veneer.errors import VeneerError
from veneer.models.load import Base
from veneer.training import train
from veneer.training.run.console import Console


class Disk:
    """Counts what is written, and refuses one of it for want of room."""

    def __init__(self, patch: pytest.MonkeyPatch, when: int) -> None:
        self.count, self.when = 0, when
        patch.setattr(Path, "open", self._wrapped(Path.open, lambda args: args[1:] and set(args[1]) & set("wa+x")))
        for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "replace"), (Path, "rename")):
            patch.setattr(owner, name, self._wrapped(getattr(owner, name), lambda args: True))
        patch.setattr(tensor_files, "save_file", self._wrapped(tensor_files.save_file, lambda args: True))

    def _wrapped(self, real: Callable[..., Any], writes: Callable[[Any], Any]) -> Callable[..., Any]:
        def effect(*args: Any, **options: Any) -> Any:
            if writes(args) or set(options.get("mode", "r")) & set("wa+x"):
                self.count += 1
                if self.count == self.when:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
            return real(*args, **options)

        return effect


def attempt(wanted: dict[str, Any], base: Base, when: int) -> tuple[str, int, str]:
    """Run with a disk that is full at its n-th write: ("done" or what was raised, writes, what was said)."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, when)
        try:
            train(wanted, base=base, console=Console(said))
            return "done", disk.count, said.getvalue()
        except (OSError, VeneerError) as error:
            return f"{type(error).__name__}: {error}", disk.count, said.getvalue()


def lasting(out: Path) -> dict[str, str]:
    """Adapters, tensors and numbers; a line of figures that found no room is told, and missing, and that an adapter had to be written
    again is remembered in the state."""
    found = {key: value for key, value in digest(out).items() if key != "state" and not key.startswith("metrics/")}
    last = newest(out / "checkpoints")
    assert last is not None
    jobs = json.loads((last / "state.json").read_text())["jobs"]
    return {**found, **{name: json.dumps({**job, "saved": True}, sort_keys=True) for name, job in jobs.items()}}


def full_at(place: Path, base: Base, folder: Path, every: int, first: int = 1) -> int:
    """A full disk at each n-th write of a run with two jobs; returns how many writes it has."""
    wanted: dict[str, Any] = {
        "steps": 4,
        "save_every": 2,
        "jobs": [{"name": "a"}, {"name": "b", "r": 1}],
        "tokens_per_shared_pass": 0,
    }
    outcome, total, _ = attempt(options(place, folder / "never", **wanted), base, 0)
    assert outcome == "done"
    expected = lasting(folder / "never")
    for when in range(first, total + 1, every):
        out = folder / str(when)
        chosen = options(place, out, **wanted)
        outcome, _, said = attempt(chosen, base, when)
        if outcome == "done":
            assert "No space left" in said or lasting(out) == expected, when
        for checkpoint in candidates(out / "checkpoints"):
            assert verified(checkpoint), (when, checkpoint)
        assert attempt(chosen, base, 0)[0] == "done", (when, outcome)
        assert lasting(out) == expected, (when, outcome)
        assert litter(out) == [], when
    return total


def test_a_full_disk_at_some_writes(place: Path, base: Base, tmp_path: Path) -> None:
    """At every ninth write of a run: the run tells and goes on, or ends in one sentence; the same call then ends it with the same bits."""
    assert full_at(place, base, tmp_path, every=9) > 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_full_disk_at_every_write(place: Path, base: Base, tmp_path: Path) -> None:
    """The same at every write."""
    full_at(place, base, tmp_path, every=1)
