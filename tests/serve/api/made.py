"""A server on a tiny base in a thread of the test's process, and clients of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai

from veneer.adapters import Method
from veneer.checkpoints import attach
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.load import load_base
from veneer.serve.engine.engine import Engine, EngineLimits
from veneer.serve.limits import ServeLimits
from veneer.serve.server import ServeOptions, Server

KEY, ADMIN_KEY = "veneer-test-key", "veneer-test-admin-key"


def write_adapters(base: Path, folder: Path, methods: dict[str, Method]) -> None:
    """Adapters with random factors in folders of their names."""
    import torch

    bank = attach(load_base(str(base), dtype="float32").model)
    for seed, (name, method) in enumerate(methods.items()):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, key, parameter in bank.add(name, method, seed=seed).named_tensors():
                if key == "lora_B":
                    parameter.normal_(0, 0.5, generator=generator)
                elif not method.low_rank:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        bank.save(name, folder / name, base_name=str(base))
    bank.detach()


class Running:
    """A server that runs in a thread."""

    def __init__(
        self,
        base: Path,
        state: Path,
        adapters: Path | None = None,
        *,
        limits: ServeLimits | None = None,
        engine_limits: EngineLimits | None = None,
        **options: Any,
    ) -> None:
        loaded = load_base(str(base), dtype="float32")
        self.bank = attach(loaded.model)
        use_fast_forwards(loaded.model)
        self.engine = Engine(loaded.model, loaded.tokenizer, self.bank, engine_limits)
        self.server = Server(
            loaded,
            self.bank,
            self.engine,
            ServeOptions(state=state, adapters=adapters, port=0, drain_seconds=2, **options),
            limits=limits,
            environment={"VENEER_API_KEY": KEY, "VENEER_ADMIN_KEY": ADMIN_KEY},
        )
        self._clients: list[openai.OpenAI] = []
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        wait(lambda: self.server.started)

    @property
    def root(self) -> str:
        """The address without /v1."""
        return self.server.url.removesuffix("/v1")

    def client(self, key: str = KEY, **options: Any) -> openai.OpenAI:
        """A synchronous client of the openai package, closed with the server."""
        options = {"max_retries": 0, "timeout": 30, **options}
        self._clients.append(openai.OpenAI(base_url=self.server.url, api_key=key, **options))
        return self._clients[-1]

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        """An asynchronous client of the openai package."""
        return openai.AsyncOpenAI(base_url=self.server.url, api_key=KEY, **{"max_retries": 0, "timeout": 30, **options})

    def http(self, key: str | None = KEY) -> httpx2.Client:
        """A plain HTTP client with a key."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.root, headers=headers, timeout=30, trust_env=False)

    def idle(self) -> bool:
        """True if the engine answers nothing."""
        found = self.engine.metrics()
        return found.running == 0 and found.waiting == 0

    def close(self) -> None:
        """Stop the server."""
        for client in self._clients:
            client.close()
        self.server.stop()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
        self.bank.detach()


def wait(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition does not come true"
        time.sleep(0.01)
