"""The server as a Ray Serve application: a gateway and replicas on the machines of a cluster.

Ray's router prefers a replica that has answered for an adapter before, and takes another one when that is full. Ray starts replicas that
are lost again. Usage statistics are off. Ray is the extra ``veneer[ray]``.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import Message, Scope

from veneer.errors import ConfigError, ServeError
from veneer.serve.api.guard import Guard
from veneer.serve.http import listen
from veneer.serve.keys import Keys, read_keys
from veneer.serve.limits import ServeLimits
from veneer.serve.loading import EngineOptions
from veneer.serve.registry import base_names
from veneer.serve.replicas.gateway import Gateway, ReplicaLostError
from veneer.serve.replicas.replica import Replica
from veneer.serve.server import LOOPBACK, require_key
from veneer.training.cluster.ray_workers import RayCluster, connected

APPLICATION = "veneer"
_REPLICA = "Replica"
_ADAPTERS = 64
"""Adapters for which a replica is preferred; the least recently asked for are forgotten."""


@dataclass(frozen=True)
class RayOptions:
    """Options of the application.

    Attributes:
        cluster: the Ray cluster: HOST:PORT, or "auto".
        replicas: number of replicas.
        engine: the base, its adapters and limits; paths are those of every machine.
        state: folder for generated keys.
        host, port: address that each machine listens on.
        allow_hosts: further host names under which clients reach it.
        key_file: file of keys, or None.
        drain_seconds: seconds that running answers have when the application stops.
    """

    cluster: str
    replicas: int
    engine: EngineOptions
    state: Path
    host: str = "127.0.0.1"
    port: int = 8000
    allow_hosts: tuple[str, ...] = ()
    key_file: Path | None = None
    drain_seconds: float = 10.0


def serve_on_ray(options: RayOptions, say: Callable[[str], None]) -> None:
    """Run the application until SIGINT or SIGTERM.

    Raises:
        ConfigError: Ray Serve is not installed, the port is in use, or an application of this name runs in the cluster.
        TrainingError: no cluster answers.
        ServeError: a replica cannot be started.
    """
    if options.port == 0:
        raise ConfigError("--port 0 takes a free port, which differs between machines; choose one for --cluster")
    require_key(options.host, options.key_file)
    options.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys = read_keys(os.environ, options.key_file, options.state / "keys")
    ended = threading.Event()
    with connected(options.cluster) as cluster:
        serve = _ray_serve()
        known = serve.status()
        if APPLICATION in known.applications:
            raise ConfigError(
                f"an application {APPLICATION} runs in this cluster; end it first, with Ctrl-C or `serve shutdown`"
            )
        if not known.proxies:
            listen(options.host, options.port).close()  # an error here is one sentence, and one of Ray's proxies is not
        serve.start(
            http_options={"host": options.host, "port": options.port},
            logging_config={"log_level": "ERROR", "enable_access_log": False},
        )
        before = {one: signal.signal(one, lambda *_: ended.set()) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            _start(serve, _application(serve, cluster, options, keys))
            say(f"Veneer serves at http://{options.host}:{options.port}/v1 from {options.replicas} replicas")
            say(f"  key      {keys.source}")
            say("Ctrl-C lets running answers end and stops the replicas.")
            while not ended.wait(1.0):
                pass
        finally:
            serve.delete(APPLICATION)
            if not serve.status().applications:
                serve.shutdown()
            for one, handler in before.items():
                signal.signal(one, handler)


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(
            f"cluster: Ray Serve needs {error.name}, which is not installed; pip install 'veneer[serve,ray]', here and on all machines"
        ) from None
    return serve


def _start(serve: Any, application: Any) -> None:
    """Wait for all replicas."""
    try:
        serve.run(application, name=APPLICATION, route_prefix="/", blocking=False)
    except RuntimeError as error:
        found = re.findall(r"veneer\.errors\.\w+: (.+)", str(error))
        raise ServeError(f"a replica cannot be started: {found[-1] if found else error}") from None


def _application(serve: Any, cluster: RayCluster, options: RayOptions, keys: Keys) -> Any:
    """The gateway bound to its replicas."""
    slots = cluster.slots()
    if not slots:
        raise ConfigError("cluster: no machine has a free CPU for a replica")
    gpus = max(slot.gpus for slot in slots) if options.engine.device != "cpu" else 0
    rows = -(-options.replicas // len(slots))  # replicas of a machine, or of a GPU
    cpus = min(slot.cpus for slot in slots)
    resources = {"num_cpus": cpus // rows or cpus / rows, "num_gpus": gpus / rows if gpus else 0}
    running = options.engine.limits.scheduler.running
    replica = serve.deployment(
        name=_REPLICA,
        num_replicas=options.replicas,
        ray_actor_options=resources,
        max_ongoing_requests=2 * running,
        max_queued_requests=-1,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=options.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
    )(_replica_class(serve))

    def build() -> Guard:
        from ray import serve

        handle = serve.get_deployment_handle(_REPLICA, APPLICATION)
        gateway = Gateway(RayReplicas(handle), base_names(options.engine.base))
        return _guarded(gateway, options, keys)

    gateway = serve.deployment(
        name="Gateway",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=options.engine.limits.waiting,
        graceful_shutdown_timeout_s=options.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
    )(serve.ingress(build)())
    return gateway.bind(replica.bind(options.engine))


def _guarded(gateway: Gateway, options: RayOptions, keys: Keys) -> Guard:
    own = [f"{name}:{options.port}" for name in ("127.0.0.1", "localhost", "[::1]", options.host.lower())]
    hosts = [*own, *(name.lower() for name in options.allow_hosts)]

    def known() -> Sequence[str]:
        return hosts

    return Guard(
        gateway,
        keys=keys,
        limits=ServeLimits(),
        hosts=known,
        any_address=options.host not in LOOPBACK,
        answered=lambda status: None,
    )


class RayReplicas:
    """Replicas behind a handle of Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def answer(self, scope: Scope, body: bytes, adapter: str) -> AsyncIterator[Message]:
        """See `Replicas`."""
        from ray.exceptions import RayActorError

        answers = self._handle.options(stream=True, multiplexed_model_id=adapter).answer.remote(scope, body)
        try:
            async for message in answers:
                yield message
        except RayActorError as error:
            raise ReplicaLostError from error
        finally:
            answers.cancel()

    async def answer_each(self, scope: Scope, body: bytes) -> dict[str, tuple[int, bytes]]:
        """See `Replicas`."""
        from ray.exceptions import RayActorError

        try:
            return dict(await self._handle.broadcast("whole_answer", scope, body).results_async())
        except RayActorError as error:
            raise ReplicaLostError from error


def _replica_class(serve: Any) -> Any:
    """The class of the replicas' actors."""

    class RayReplica:
        def __init__(self, options: EngineOptions) -> None:
            self._replica = Replica(options)

        async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
            name = serve.get_multiplexed_model_id()
            if name:
                await self.prefer(name)
            async for message in self._replica.answer(scope, body):
                yield message

        async def whole_answer(self, scope: Scope, body: bytes) -> tuple[str, tuple[int, bytes]]:
            name = serve.get_replica_context().replica_id.unique_id
            return name, await self._replica.whole_answer(scope, body)

        def check_health(self) -> None:
            """Called by Ray Serve, which replaces a replica where this raises."""
            self._replica.check_health()

        @serve.multiplexed(max_num_models_per_replica=_ADAPTERS)  # type: ignore[untyped-decorator]
        async def prefer(self, name: str) -> str:
            """Tell the router that this replica answers for an adapter; the engine loads it."""
            return name

        def __del__(self) -> None:
            if hasattr(self, "_replica"):  # else the base could not be loaded
                self._replica.close()

    return RayReplica
