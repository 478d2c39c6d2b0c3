"""Figures to an experiment tracker beside the run's own files: TensorBoard, Trackio or Weights & Biases.

Three calls: start, log, end. The tracker's package is an extra and is imported when it is asked for; what it does with the figures,
and where it sends them, is its own affair. The run's folder never depends on it: an error of a tracker is told once, and it is left.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from veneer.errors import ConfigError

_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
NAMES = tuple(_PACKAGES)


_T = TypeVar("_T")


class _Sink(Protocol):
    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None: ...
    def end(self) -> None: ...


class Track:
    """A tracker of one run."""

    def __init__(self, sink: _Sink | None, tell: Callable[[str], None]) -> None:
        self._sink = sink
        self._tell = tell

    @classmethod
    def start(cls, name: str, out: Path, config: Mapping[str, Any], tell: Callable[[str], None]) -> Track:
        """Begin to track a run. A tracker that cannot begin is told of and left, as one that fails later."""
        found = cls(None, tell)
        found._sink = found._try(lambda: _SINKS[name](out, config))
        return found

    def log(self, job: str, line: Mapping[str, Any]) -> None:
        """Hand on the numbers of one line of figures."""
        figures = {key: float(value) for key, value in line.items() if key != "step" and _number(value)}
        self._do(lambda sink: sink.log(job, int(line["step"]), figures))

    def end(self) -> None:
        """The run is over, or stops for the present."""
        self._do(lambda sink: sink.end())

    def _do(self, call: Callable[[_Sink], None]) -> None:
        if self._sink is not None:
            sink = self._sink
            self._try(lambda: call(sink))

    def _try(self, call: Callable[[], _T]) -> _T | None:
        try:
            return call()
        except Exception as error:  # whatever a tracker may raise, it must not end a run
            self._sink = None
            self._tell(f"the tracker failed and is left: {type(error).__name__}: {error}")
            return None


def require(name: str) -> None:
    """Raise ConfigError where the tracker's package is not installed."""
    try:
        importlib.import_module(_PACKAGES[name])
    except ImportError as error:
        raise ConfigError(
            f"track asks for {name}, and its package is not here ({error}); install it (pip install {name}), or leave track out"
        ) from None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _TensorBoard:
    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        self._writer: Any = importlib.import_module(_PACKAGES["tensorboard"]).SummaryWriter
        self._writers: dict[str, Any] = {}
        self._folder = out / "tensorboard"

    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None:
        if job not in self._writers:
            self._writers[job] = self._writer(str(self._folder / job))
        for key, value in figures.items():
            self._writers[job].add_scalar(key, value, step)

    def end(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Runs:
    """Trackio and Weights & Biases, which have the same three calls."""

    def __init__(self, package: str, out: Path, config: Mapping[str, Any]) -> None:
        self._api: Any = importlib.import_module(package)
        self._api.init(project=out.resolve().parent.name or "veneer", name=out.resolve().name, config=dict(config))

    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None:
        self._api.log({f"{job}/step": step, **{f"{job}/{key}": value for key, value in figures.items()}})

    def end(self) -> None:
        self._api.finish()


_SINKS: dict[str, Callable[[Path, Mapping[str, Any]], _Sink]] = {
    "tensorboard": _TensorBoard,
    "trackio": lambda out, config: _Runs("trackio", out, config),
    "wandb": lambda out, config: _Runs("wandb", out, config),
}
