"""Experiment trackers, in addition to the run's own files: TensorBoard, Trackio or Weights & Biases.

A tracker has three calls: start, log, end. Its package is optional and imported only when asked for; the tracker alone decides where the
metrics go. A run never depends on a tracker: an error of a tracker is printed once, and the run goes on without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from veneer.errors import ConfigError

_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}

_T = TypeVar("_T")


class _Backend(Protocol):
    def log(self, job: str, step: int, metrics: Mapping[str, float]) -> None: ...
    def end(self) -> None: ...


class ExperimentTracker:
    """Logs the metrics of one run to a backend. An error of the backend is printed, and the backend dropped."""

    def __init__(self, name: str, out: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Start the tracker ``name`` for the run in ``out``; ``say`` prints a line."""
        self._say = say
        self._backend: _Backend | None = None
        self._backend = self._try(lambda: _BACKENDS[name](out, config))

    def log(self, job: str, line: Mapping[str, Any]) -> None:
        """Log the numbers of one line of metrics."""
        metrics = {key: float(value) for key, value in line.items() if key != "step" and _is_number(value)}
        if (backend := self._backend) is not None:
            self._try(lambda: backend.log(job, int(line["step"]), metrics))

    def end(self) -> None:
        """End the tracker's run."""
        if (backend := self._backend) is not None:
            self._try(backend.end)

    def _try(self, call: Callable[[], _T]) -> _T | None:
        try:
            return call()
        except Exception as error:  # no error of a tracker may end a run
            self._backend = None
            self._say(f"the tracker failed and is no longer used: {type(error).__name__}: {error}")
            return None


def require(name: str) -> None:
    """Raise ConfigError if the tracker's package is not installed."""
    try:
        importlib.import_module(_PACKAGES[name])
    except ImportError as error:
        raise ConfigError(
            f"track: the package of {name} is not installed ({error}); install it (pip install {name}), or leave track out"
        ) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _TensorBoard:
    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        self._writer: Any = importlib.import_module(_PACKAGES["tensorboard"]).SummaryWriter
        self._writers: dict[str, Any] = {}
        self._folder = out / "tensorboard"

    def log(self, job: str, step: int, metrics: Mapping[str, float]) -> None:
        if job not in self._writers:
            self._writers[job] = self._writer(str(self._folder / job))
        for key, value in metrics.items():
            self._writers[job].add_scalar(key, value, step)

    def end(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _WandbLike:
    """Trackio and Weights & Biases, which have the same three calls."""

    def __init__(self, package: str, out: Path, config: Mapping[str, Any]) -> None:
        self._api: Any = importlib.import_module(package)
        self._api.init(project=out.resolve().parent.name or "veneer", name=out.resolve().name, config=dict(config))

    def log(self, job: str, step: int, metrics: Mapping[str, float]) -> None:
        self._api.log({f"{job}/step": step, **{f"{job}/{key}": value for key, value in metrics.items()}})

    def end(self) -> None:
        self._api.finish()


_BACKENDS: dict[str, Callable[[Path, Mapping[str, Any]], _Backend]] = {
    "tensorboard": _TensorBoard,
    "trackio": lambda out, config: _WandbLike("trackio", out, config),
    "wandb": lambda out, config: _WandbLike("wandb", out, config),
}
