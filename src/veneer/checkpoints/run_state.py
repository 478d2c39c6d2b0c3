"""The state of a run between two rounds, written to and read from a checkpoint.

It holds everything that the next step depends on: adapter tensors, optimizer moments and step counts, the position of the dropout
stream, the cursor into the data, counts, the evaluation history and the best result of each job. It also holds the length of each metrics
file, so that lines written after the last checkpoint are removed on resume. Tensors are stored as safetensors, the rest as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from veneer._locks import lock
from veneer.adapters import Adapter
from veneer.checkpoints.tensors import save_tensors
from veneer.errors import CheckpointError, FolderInUseError

TENSORS, STATE = "tensors.safetensors", "state.json"


class Lock:
    """A lock of a run folder: one process at a time. The system releases it when the process ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._handle: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Lock:
        folder = self._path.parent
        try:
            self._made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file")
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = self._open()
            os.ftruncate(self._handle, 0)
            os.write(self._handle, str(os.getpid()).encode())
        except OSError as error:
            if self._handle is not None:
                self.leave_nothing()
                self.__exit__()
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"{folder} cannot be written: {reason}; choose another folder for the run with --out"
            ) from error
        return self

    def _open(self) -> int:
        holder = "unknown"
        while True:
            try:
                handle = lock(self._path)
            except BlockingIOError:
                with contextlib.suppress(OSError):
                    holder = self._path.read_text(errors="replace")[:32].strip() or holder
                raise FolderInUseError(
                    f"{self._path.parent} is in use by another process ({holder}); wait for it, stop it, or choose another folder "
                    "with --out"
                ) from None
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(handle), self._path.stat()):
                    return handle
            os.close(handle)  # the file was removed meanwhile, so this lock protects nothing

    def leave_nothing(self, *more: Path) -> None:
        """Remove the lock file, and the empty folders among ``more`` and those that the lock made."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in (*(folder for folder in more if folder.is_dir()), *self._made):
                folder.rmdir()

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def job_tensors(name: str, adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a job by name: ``adapter/<job>/<site>/<tensor>`` and ``optimizer/<job>/<number>/<moment>``.

    Raises CheckpointError for a tensor that is not finite: such a state is never saved.
    """
    found: dict[str, Tensor] = {}
    for site, key, parameter in adapter.named_tensors():
        found[f"adapter/{name}/{site}/{key}"] = parameter.detach().cpu()
    for number, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            if isinstance(value, Tensor):
                found[f"optimizer/{name}/{number}/{key}"] = value.detach().cpu()
    for key, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f'{key} is not finite; the state of job "{name}" is not saved over its last good one')
    return found


def write_state(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint's two files from private copies of the tensors.

    Raises OSError if they cannot be written.
    """
    copies = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    save_tensors(copies, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A verified checkpoint's tensors and numbers."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return load_file(folder / TENSORS), state


def restore_job(name: str, tensors: Mapping[str, Tensor], adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
    """Restore the tensors of a job in place, so that the optimizer keeps its parameters.

    Raises CheckpointError if they do not fit the adapter.
    """
    saved_tensors = {key: value for key, value in tensors.items() if key.split("/", 2)[1] == name}
    with torch.no_grad():
        for site, key, parameter in adapter.named_tensors():
            saved = saved_tensors.get(f"adapter/{name}/{site}/{key}")
            if saved is None or saved.shape != parameter.shape or saved.dtype != parameter.dtype:
                raise CheckpointError(
                    f'the checkpoint does not fit job "{name}" at {site}.{key}; start over with --fresh'
                )
            parameter.copy_(saved)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved_tensors.items():
        if key.startswith("optimizer/"):
            number, moment = key.rsplit("/", 2)[1:]
            state.setdefault(int(number), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
