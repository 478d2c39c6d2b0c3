"""Load on a server of a tiny base, on the loopback interface: python -m bench.serve_load [CASE ...]

streams     1,000 clients that stream at once over 50 adapters: failures, seconds to the first token, memory
cut         10,000 requests of which a fifth is cut at a random token: what is left in the engine, open files
headers     1,000 half-sent headers: the time of /health meanwhile
replace     an adapter is replaced every 50 ms under 20 streams, for 60 s: errors, versions
jobs        tokens per second of 8 clients alone and beside four jobs, and the jobs' steps per second
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import torch
from tests.serve.api.made import ADMIN_KEY, KEY, Running, write_adapters
from tests.training.made import write_place

from veneer.adapters import DoRA, LoRA

ADAPTERS = 50


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def client(running: Running, key: str = KEY) -> httpx2.AsyncClient:
    """An HTTP client without limits on its connections."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
    headers = {"authorization": f"Bearer {key}"}
    return httpx2.AsyncClient(base_url=running.root, headers=headers, limits=limits, timeout=600, trust_env=False)


async def stream(
    http: httpx2.AsyncClient, model: str, tokens: int, *, cut_after: int | None = None
) -> tuple[float, int, bool]:
    """(seconds to the first text, events, whether the stream ended with [DONE]) of one request."""
    body = {
        "model": model,
        "prompt": "The rain",
        "max_tokens": tokens,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
    }
    began, first, events, done = time.monotonic(), 0.0, 0, False
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                events += 1
                first = first or time.monotonic() - began
            done |= line == "data: [DONE]"
            if cut_after is not None and events >= cut_after:
                return first, events, False
    return first, events, done


async def streams(running: Running) -> dict[str, Any]:
    """1,000 clients at once."""
    before = resident()
    async with client(running) as http:
        tasks = [stream(http, f"adapter{i % ADAPTERS}", 16) for i in range(1000)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
    complete = [one for one in found if not isinstance(one, BaseException) and one[2]]
    firsts = sorted(one[0] for one in complete)
    return {
        "clients": len(found),
        "failed": len(found) - len(complete),
        "first_token_median_s": round(statistics.median(firsts), 3),
        "first_token_p99_s": round(firsts[int(0.99 * len(firsts))], 3),
        "memory_growth_mb": round(resident() - before, 1),
    }


async def cut(running: Running) -> dict[str, Any]:
    """10,000 requests, a fifth of them cut."""
    rng = random.Random(0)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    failed = 0
    async with client(running) as http:
        gate = asyncio.Semaphore(100)

        async def one(i: int) -> None:
            nonlocal failed
            async with gate:
                after = rng.randint(1, 6) if rng.random() < 0.2 else None
                try:
                    await stream(http, f"adapter{i % ADAPTERS}", 8, cut_after=after)
                except httpx2.HTTPError:
                    failed += 1

        await asyncio.gather(*(one(i) for i in range(10_000)))
    await asyncio.sleep(2)
    left = running.engine.metrics()
    return {
        "failed": failed,
        "running": left.running,
        "waiting": left.waiting,
        "blocks_in_use": left.blocks - left.free_blocks,
        "blocks_cached": left.cached_blocks,
        "files_opened": len(list(Path("/proc/self/fd").iterdir())) - opened,
    }


async def headers(running: Running) -> dict[str, Any]:
    """1,000 half-sent headers."""
    halves = [socket.create_connection(("127.0.0.1", running.server.port)) for _ in range(1000)]
    for half in halves:
        half.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x")
    times = []
    async with client(running) as http:
        for _ in range(50):
            began = time.monotonic()
            (await http.get("/health")).raise_for_status()
            times.append(1000 * (time.monotonic() - began))
        await asyncio.sleep(12)
    closed = 0
    for half in halves:
        half.setblocking(False)
        try:
            closed += half.recv(1) == b""
        except ConnectionResetError:
            closed += 1
        except BlockingIOError:
            pass
        half.close()
    return {
        "health_median_ms": round(statistics.median(times), 1),
        "health_most_ms": round(max(times), 1),
        "closed": closed,
    }


async def replace(running: Running, seconds: float = 60) -> dict[str, Any]:
    """Adapters replaced under streams."""
    until, failed, answers, replaced = time.monotonic() + seconds, 0, 0, 0
    before = resident()
    async with client(running) as http, client(running, ADMIN_KEY) as admin:

        async def load() -> None:
            nonlocal failed, answers
            while time.monotonic() < until:
                try:
                    _, _, done = await stream(http, "adapter0", 32)
                    answers, failed = answers + 1, failed + (not done)
                except httpx2.HTTPError:
                    failed += 1

        async def swap() -> None:
            nonlocal replaced
            while time.monotonic() < until:
                (await admin.post("/v1/load_lora_adapter", json={"lora_name": "adapter0"})).raise_for_status()
                replaced += 1
                await asyncio.sleep(0.05)

        await asyncio.gather(*(load() for _ in range(20)), swap())
    return {
        "answers": answers,
        "failed": failed,
        "replaced": replaced,
        "memory_growth_mb": round(resident() - before, 1),
    }


async def jobs(running: Running, seconds: float = 20) -> dict[str, Any]:
    """Requests alone and beside four jobs."""

    async def rate(http: httpx2.AsyncClient) -> float:
        until, tokens = time.monotonic() + seconds, 0

        async def load(i: int) -> None:
            nonlocal tokens
            while time.monotonic() < until:
                tokens += (await stream(http, f"adapter{i}", 32))[1]

        await asyncio.gather(*(load(i) for i in range(8)))
        return tokens / seconds

    async with client(running) as http:
        alone = await rate(http)
        rows = (running.place / "train.jsonl").read_bytes()  # type: ignore[attr-defined]
        form = {"purpose": "fine-tune"}
        file = (await http.post("/v1/files", data=form, files={"file": ("rows.jsonl", rows)})).json()["id"]
        body = {"model": "base", "training_file": file, "training": {"steps": 100_000, "save_every": 10_000}}
        made = [(await http.post("/v1/fine_tuning/jobs", json={**body, "seed": i})).json()["id"] for i in range(4)]
        await asyncio.sleep(3)
        began = [running.server.context.jobs[job]["step"] for job in made]
        beside = await rate(http)
        ended = [running.server.context.jobs[job]["step"] for job in made]
        for job in made:
            await http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    steps = [round((b - a) / seconds, 1) for a, b in zip(began, ended, strict=True)]
    return {
        "tokens_per_s_alone": round(alone),
        "beside_jobs": round(beside),
        "share": round(beside / alone, 2),
        "job_steps_per_s": steps,
    }


CASES: dict[str, Callable[[Running], Awaitable[dict[str, Any]]]] = {
    "streams": streams,
    "cut": cut,
    "headers": headers,
    "replace": replace,
    "jobs": jobs,
}


def main() -> None:
    """Run the cases that are named, or all."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = write_place(Path(folder))
        methods = {f"adapter{i}": DoRA(r=2) if i % 2 else LoRA(r=4) for i in range(ADAPTERS)}
        write_adapters(place / "base", place / "adapters", methods)
        running = Running(place / "base", place / "state", place / "adapters", parallel_jobs=4)
        running.place = place  # type: ignore[attr-defined]
        for name in sys.argv[1:] or CASES:
            began = time.monotonic()
            found = asyncio.run(CASES[name](running))  # type: ignore[arg-type]
            print(json.dumps({"case": name, **found, "seconds": round(time.monotonic() - began, 1)}), flush=True)
        running.close()


if __name__ == "__main__":
    main()
