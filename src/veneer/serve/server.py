"""A server: base, engine, state and HTTP, from start to stop.

state/.lock       held while a server uses the folder
state/keys        generated keys, readable by the owner only
state/state.db    files, adapters, jobs and events
state/files/      content of uploaded files
state/jobs/       runs of jobs
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from veneer.adapters import Bank
from veneer.checkpoints.run_state import Lock
from veneer.errors import BaseModelError, CheckpointError, ConfigError
from veneer.models.load import Base
from veneer.serve.api.app import create_app
from veneer.serve.api.context import ApiContext
from veneer.serve.api.metrics import ServeMetrics
from veneer.serve.api.prompts import PromptRenderer
from veneer.serve.api.token_names import TokenNames
from veneer.serve.engine.engine import Engine
from veneer.serve.http import HttpServer, listen
from veneer.serve.jobs.queue import JobQueue
from veneer.serve.keys import Keys, read_keys
from veneer.serve.limits import ServeLimits
from veneer.serve.registry import ModelRegistry
from veneer.serve.store.database import Database
from veneer.serve.store.files import FileStore
from veneer.serve.store.jobs import JobStore
from veneer.training.shared_base import SharedBase

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server.

    Attributes:
        state: folder of its state.
        adapters: folder of adapters and runs, or None.
        host, port: address to listen on; port 0 takes a free one.
        allow_hosts: further host names under which clients reach it, such as that of a proxy.
        key_file: file of keys, or None.
        parallel_jobs: jobs that run at once.
        drain_seconds: seconds that running answers have when the server stops.
    """

    state: Path
    adapters: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    allow_hosts: tuple[str, ...] = ()
    key_file: Path | None = None
    parallel_jobs: int = 2
    drain_seconds: float = 10.0


def open_context(
    stack: ExitStack, base: Base, bank: Bank, engine: Engine, options: ServeOptions, limits: ServeLimits
) -> tuple[ApiContext, dict[str, str]]:
    """The parts of a server on its state folder, and {adapter: problem} of those that cannot be served. ``stack`` closes the database."""
    if base.tokenizer is None:
        raise BaseModelError(
            "the base has no tokenizer, so it cannot be served; add its tokenizer's files to the folder"
        )
    database = Database(options.state / "state.db")
    stack.callback(database.close)
    files, jobs = FileStore(database, options.state / "files"), JobStore(database)
    registry = ModelRegistry(
        database, jobs, engine, base_name=base.name, folder=options.adapters, jobs_folder=options.state / "jobs"
    )
    shared = SharedBase(base, bank, engine.exclusive)
    queue = JobQueue(jobs, files, shared, options.state / "jobs", registry, parallel=options.parallel_jobs)
    problems = registry.restore()
    context = ApiContext(
        base=base,
        tokenizer=base.tokenizer,
        engine=engine,
        registry=registry,
        prompts=PromptRenderer(base.tokenizer, limits),
        token_names=TokenNames(base.tokenizer),
        files=files,
        jobs=jobs,
        queue=queue,
        limits=limits,
        metrics=ServeMetrics(engine, lambda: Counter(jobs.statuses())),
    )
    return context, problems


def require_key(host: str, key_file: Path | None, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where other machines could reach a server whose key nobody chose."""
    if host not in LOOPBACK and not environment.get("VENEER_API_KEY") and key_file is None:
        raise ConfigError(
            f"--host {host} can be reached from other machines; set a key in VENEER_API_KEY or a file (--key-file) first"
        )


class Server:
    """A server that is ready to run. Close it at the end."""

    def __init__(
        self,
        base: Base,
        bank: Bank,
        engine: Engine,
        options: ServeOptions,
        *,
        limits: ServeLimits | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Open the state, load the adapters and listen. The engine is started by `run`.

        Raises:
            ConfigError: the port is in use, or another interface than the loopback one was chosen without a key.
            CheckpointError: the state is in use or cannot be written.
            BaseModelError: the base has no tokenizer.
        """
        self.options = options
        self.engine = engine
        limits = limits or ServeLimits()
        environment = os.environ if environment is None else environment
        with ExitStack() as stack:
            self.keys = self._open(stack, environment)
            self.listener = stack.enter_context(listen(options.host, options.port))
            self.context, self.problems = open_context(stack, base, bank, engine, options, limits)
            self.registry, self.queue = self.context.registry, self.context.queue
            outside = options.host not in LOOPBACK
            app = create_app(self.context, self.keys, hosts=self.hosts, any_address=outside)
            self._http = HttpServer(app, limits, drain_seconds=options.drain_seconds, on_exit=self._drain)
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack, environment: Mapping[str, str]) -> Keys:
        """Lock the state and read the keys."""
        options = self.options
        require_key(options.host, options.key_file, environment)
        try:
            stack.enter_context(Lock(options.state))
        except CheckpointError as error:
            raise CheckpointError(
                str(error).replace("for the run with --out", "with --state").replace("--out", "--state")
            ) from None
        options.state.chmod(0o700)
        (options.state / "jobs").mkdir(exist_ok=True)
        return read_keys(environment, options.key_file, options.state / "keys")

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return int(self.listener.getsockname()[1])

    @property
    def url(self) -> str:
        """The address of the API."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"http://{host}:{self.port}/v1"

    def hosts(self) -> Sequence[str]:
        """Host headers under which the server answers."""
        own = [f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]", self.options.host.lower())]
        return [*own, *(name.lower() for name in self.options.allow_hosts)]

    def run(self) -> None:
        """Serve until a signal or `stop` ends it: running answers have time to end, running jobs are saved."""
        self.engine.start()
        self.queue.start()
        # A full collection walks all objects of torch and transformers: 0.3 s in which nothing is answered. Those that exist by now stay.
        gc.freeze()
        try:
            asyncio.run(self._http.serve(sockets=[self.listener]))
        finally:
            self.queue.stop()
            self.engine.stop()
            self._stack.close()
            gc.unfreeze()

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._http.should_exit = True

    @property
    def started(self) -> bool:
        """True as soon as requests are answered."""
        return bool(self._http.started)

    def _drain(self) -> None:
        self.context.draining = True
