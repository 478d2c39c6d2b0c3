"""Workers in a Ray cluster: one for each GPU, and one for each machine without.

Ray's usage statistics are off. Ray is the extra ``veneer[ray]``.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from veneer.errors import ConfigError, TrainingError
from veneer.training.cluster.worker import ClusterWorker, TrainPart

_CONNECT_SECONDS = 5.0
_THREADS = 4
"""Calls that a worker answers at once: a part in training, and questions about it."""


@dataclass(frozen=True)
class Slot:
    """A place for a worker: a machine of the cluster, and the number of its GPU. ``cpus``, ``gpus``: what the worker reserves."""

    node: str
    address: str
    number: int
    cpus: float
    gpus: int

    @property
    def name(self) -> str:
        """The place in words."""
        return f"{self.address}, GPU {self.number}" if self.gpus else self.address


class RayCluster:
    """A connection to a cluster."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray

    def slots(self) -> list[Slot]:
        """The places for workers on all machines that are alive."""
        found = []
        for node in self.ray.nodes():
            cpus, gpus = node["Resources"].get("CPU", 0.0), int(node["Resources"].get("GPU", 0))
            if not node["Alive"] or cpus < 1:
                continue
            each = float(max(1, int(cpus) // max(1, gpus)))
            address = node["NodeManagerAddress"]
            found += [Slot(node["NodeID"], address, n, each, min(1, gpus)) for n in range(max(1, gpus))]
        return sorted(found, key=lambda slot: (slot.address, slot.node, slot.number))

    def start(self, slot: Slot, train_part: TrainPart) -> Any:
        """Start a worker; its methods are called with ``worker.method.remote(...)``."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self.ray.remote(ClusterWorker).options(
            num_cpus=slot.cpus,
            num_gpus=slot.gpus,
            max_concurrency=_THREADS,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
        )
        return actor.remote(train_part)

    def wait(self, calls: Sequence[Any], seconds: float) -> list[Any]:
        """The calls that have ended, after this time or as soon as one has."""
        return list(self.ray.wait(list(calls), timeout=seconds)[0])

    def answers(self, calls: Sequence[Any], seconds: float) -> list[Any]:
        """The answer to each call: a value, or the exception of one that failed or took too long."""
        self.ray.wait(list(calls), num_returns=len(calls), timeout=seconds)
        return [self.answer(call, 0.0) for call in calls]

    def answer(self, call: Any, seconds: float) -> Any:
        """The answer to one call, or the exception."""
        try:
            return self.ray.get(call, timeout=seconds)
        except Exception as error:  # a worker that is gone, an answer that is late, or any error in the call
            return error

    def lost(self, answer: Any) -> bool:
        """True if an answer says that the worker is gone."""
        return isinstance(answer, self.ray.exceptions.RayActorError)

    def end(self, worker: Any) -> None:
        """End a worker's process."""
        self.ray.kill(worker, no_restart=True)


@contextmanager
def connected(address: str) -> Iterator[RayCluster]:
    """A connection to the cluster at ``address``, or with "auto" to the one that runs on this machine.

    Raises:
        ConfigError: Ray is not installed, or has another version than the cluster.
        TrainingError: no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a future default, which Ray warns of otherwise
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "cluster: Ray is not installed; pip install 'veneer[ray]', here and on all machines"
        ) from None
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise TrainingError(_unreachable(address, str(error).splitlines()[0])) from None
    except RuntimeError as error:  # versions of Ray or Python that differ
        raise ConfigError(
            f"cluster: {' '.join(str(error).split())}; install the same versions on all machines"
        ) from None
    try:
        yield RayCluster(ray)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise where nothing listens at HOST:PORT: Ray itself would try for a long time."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ConfigError(
            f"cluster: expected auto or HOST:PORT, such as 10.0.0.1:6379, found {address!r}; run the command on a machine of the cluster"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise TrainingError(_unreachable(address, error.strerror or str(error))) from None


def _unreachable(address: str, why: str) -> str:
    where = "on this machine" if address == "auto" else f"at {address}"
    return (
        f"cluster: no Ray cluster answers {where} ({why}); start one with `ray start --head --disable-usage-stats`, and the other "
        "machines with `ray start --address HOST:6379`"
    )
