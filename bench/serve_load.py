"""Load on a server of a tiny base, on the loopback interface: python -m bench.serve_load [CASE ...] [--scale 0.1]

streams     1,000 clients that stream at once over 50 adapters: failures, seconds to the first token, memory
cut         10,000 requests of which a fifth is cut at a random token: what is left in the engine and the server
headers     1,000 half-sent headers: the time of /health meanwhile
replace     an adapter is replaced every 50 ms under 20 streams, for ten minutes: errors, memory after a minute and at the end
slow        500 clients that hardly read beside 20 that do: failures, who was cut, what is left
fair        95 of 100 clients on one adapter: seconds to the first token of the others, alone and beside them
jobs        tokens per second of 8 clients alone and beside four jobs, and the jobs' steps per second

``--scale`` makes numbers of clients and seconds smaller. In full on two cores: cut 4 minutes, replace 10, slow 2, the others 1 each.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
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


def left(running: Running) -> dict[str, int]:
    """What the engine and the server still hold."""
    gc.collect()
    metrics, http = running.engine.metrics(), running.server._http.server_state
    return {
        "running": metrics.running,
        "waiting": metrics.waiting,
        "blocks": metrics.blocks - metrics.free_blocks,
        "references": sum(one.running + one.waiting for one in running.engine.adapters()),
        "tasks": len(http.tasks),
        "connections": len(http.connections),
    }


async def streams(running: Running, scale: float) -> dict[str, Any]:
    """1,000 clients at once."""
    before = resident()
    async with client(running) as http:
        tasks = [stream(http, f"adapter{i % ADAPTERS}", 16) for i in range(round(1000 * scale))]
        found = await asyncio.gather(*tasks, return_exceptions=True)
    complete = [one for one in found if not isinstance(one, BaseException) and one[2]]
    firsts = sorted(one[0] for one in complete)
    failures = Counter(type(one).__name__ if isinstance(one, BaseException) else "not complete" for one in found)
    failures["not complete"] -= len(complete)
    return {
        "clients": len(found),
        "failed": dict(+failures),
        "first_token_median_s": round(statistics.median(firsts), 3),
        "first_token_p99_s": round(firsts[int(0.99 * len(firsts))], 3),
        "memory_growth_mb": round(resident() - before, 1),
    }


async def cut(running: Running, scale: float) -> dict[str, Any]:
    """10,000 requests, a fifth of them cut."""
    rng = random.Random(0)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    before, failed, cuts = resident(), 0, 0
    async with client(running) as http:
        gate = asyncio.Semaphore(100)

        async def one(i: int) -> None:
            nonlocal failed, cuts
            async with gate:
                after = rng.randint(1, 6) if rng.random() < 0.2 else None
                try:
                    _, _, done = await stream(http, f"adapter{i % ADAPTERS}", 8, cut_after=after)
                    cuts += after is not None
                    failed += after is None and not done
                except httpx2.HTTPError:
                    failed += 1

        await asyncio.gather(*(one(i) for i in range(round(10_000 * scale))))
    await asyncio.sleep(2)
    files = len(list(Path("/proc/self/fd").iterdir())) - opened
    growth = round(resident() - before, 1)
    return {"failed": failed, "cut": cuts, "left": {**left(running), "files": files}, "memory_growth_mb": growth}


async def headers(running: Running, scale: float) -> dict[str, Any]:
    """1,000 half-sent headers."""
    clock = time.pthread_getcpuclockid(running._thread.ident or 0)
    cpu = time.clock_gettime(clock)
    halves = [socket.create_connection(("127.0.0.1", running.server.port)) for _ in range(round(1000 * scale))]
    for half in halves:
        half.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x")
    times = []
    async with client(running) as http:
        for _ in range(50):
            began = time.monotonic()
            (await http.get("/health")).raise_for_status()
            times.append(1000 * (time.monotonic() - began))
        cpu = time.clock_gettime(clock) - cpu
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
        "loop_cpu_ms": round(1000 * cpu, 1),
        "closed": closed,
    }


async def replace(running: Running, scale: float) -> dict[str, Any]:
    """Adapters replaced under streams."""
    seconds = 600 * scale
    until, failed, answers, replaced = time.monotonic() + seconds, 0, 0, 0
    memory: list[float] = []
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
            place: Path = running.place  # type: ignore[attr-defined]
            one, other = place / "adapters" / "adapter0", place / "others" / "adapter0"
            while time.monotonic() < until:
                # The folder's content changes as a whole, so that each load finds another version.
                aside = place / "aside"
                one.rename(aside)
                other.rename(one)
                aside.rename(other)
                (await admin.post("/v1/load_lora_adapter", json={"lora_name": "adapter0"})).raise_for_status()
                replaced += 1
                await asyncio.sleep(0.05)

        async def watch() -> None:
            while time.monotonic() < until:
                await asyncio.sleep(seconds / 10)
                memory.append(round(resident(), 1))

        await asyncio.gather(*(load() for _ in range(20)), swap(), watch())
    await asyncio.sleep(1)
    return {
        "answers": answers,
        "failed": failed,
        "replaced": replaced,
        "memory_mb": memory,
        "versions": len(running.engine._store._versions),
        "left": left(running),
    }


async def slow(running: Running, scale: float) -> dict[str, Any]:
    """500 clients that read a byte now and then, beside 20 that read at once."""
    body = json.dumps(
        {
            "model": "adapter1",
            "prompt": "a",
            "max_tokens": 200,
            "n": 2,
            "stream": True,
            "logprobs": 20,
            "ignore_eos": True,
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{running.server.port}\r\nAuthorization: Bearer {KEY}\r\n"
    asked = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    before, loop = resident(), asyncio.get_running_loop()
    count = round(500 * scale)

    async def reader() -> str:
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(connection, ("127.0.0.1", running.server.port))
        await loop.sock_sendall(connection, asked)
        until = time.monotonic() + 100
        try:
            while time.monotonic() < until:
                if not await loop.sock_recv(connection, 16):
                    return "ended"
                await asyncio.sleep(2)
            return "open"
        except ConnectionResetError:
            return "cut"
        finally:
            connection.close()

    async with client(running) as http:
        readers = [asyncio.create_task(reader()) for _ in range(count)]
        await asyncio.sleep(2)
        found = await asyncio.gather(
            *(stream(http, f"adapter{i}", 16) for i in range(20) for _ in range(5)), return_exceptions=True
        )
        most = resident()
        how = [await one for one in readers]
    ended = time.monotonic()
    while any(left(running).values()) and time.monotonic() < ended + 60:
        await asyncio.sleep(0.2)
    complete = [one for one in found if not isinstance(one, BaseException) and one[2]]
    return {
        "readers": {kind: how.count(kind) for kind in sorted(set(how))},
        "quick_failed": len(found) - len(complete),
        "quick_first_token_most_s": round(max(one[0] for one in complete), 3),
        "memory_growth_mb": [round(most - before, 1), round(resident() - before, 1)],
        "left": left(running),
        "empty_after_s": round(time.monotonic() - ended, 1),
        "step_ms": round(1000 * running.engine.metrics().busy_seconds / running.engine.metrics().steps, 1),
    }


async def fair(running: Running, scale: float) -> dict[str, Any]:
    """95 clients on one adapter and five on others."""
    seconds = 20 * scale
    firsts: dict[str, list[float]] = {}

    async def load(http: httpx2.AsyncClient, model: str, kind: str, until: float, tokens: int) -> None:
        while time.monotonic() < until:
            firsts.setdefault(kind, []).append((await stream(http, model, tokens))[0])

    async with client(running) as http:
        until = time.monotonic() + seconds
        await asyncio.gather(*(load(http, f"adapter{i}", "alone", until, 8) for i in range(1, 6)))
        until, steps = time.monotonic() + seconds, running.engine.metrics()
        busy = [load(http, "adapter0", "busy", until, 64) for _ in range(95)]
        await asyncio.gather(*busy, *(load(http, f"adapter{i}", "others", until, 8) for i in range(1, 6)))
        ended = running.engine.metrics()
    step = (ended.busy_seconds - steps.busy_seconds) / (ended.steps - steps.steps)
    result: dict[str, Any] = {"step_ms": round(1000 * step, 1)}
    for kind, times in firsts.items():
        times.sort()
        result[kind] = {
            "answers": len(times),
            "first_token_median_ms": round(1000 * statistics.median(times), 1),
            "first_token_p99_ms": round(1000 * times[int(0.99 * len(times))], 1),
        }
    return {**result, "p99_in_steps": round(result["others"]["first_token_p99_ms"] / 1000 / step, 1)}


async def jobs(running: Running, scale: float) -> dict[str, Any]:
    """Requests alone and beside four jobs. The shares of processor time hold on a busy machine too."""
    seconds = 20 * scale

    def spent(threads: Iterable[threading.Thread | None]) -> float:
        return sum(time.clock_gettime(time.pthread_getcpuclockid(one.ident)) for one in threads if one and one.ident)

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
        engine, others = [running.engine._thread], list(running.server.queue._running.values())
        before = spent(engine), spent(others)
        beside = await rate(http)
        serving, training = spent(engine) - before[0], spent(others) - before[1]
        ended = [running.server.context.jobs[job]["step"] for job in made]
        for job in made:
            await http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    steps = [round((b - a) / seconds, 1) for a, b in zip(began, ended, strict=True)]
    return {
        "tokens_per_s_alone": round(alone),
        "beside_jobs": round(beside),
        "share": round(beside / alone, 2),
        "cpu_share": round(serving / (serving + training), 2),
        "job_steps_per_s": steps,
    }


CASES: dict[str, Callable[[Running, float], Awaitable[dict[str, Any]]]] = {
    "streams": streams,
    "cut": cut,
    "headers": headers,
    "replace": replace,
    "slow": slow,
    "fair": fair,
    "jobs": jobs,
}


def main() -> None:
    """Run the cases that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"there is no case {unknown.pop()}; there are: {', '.join(CASES)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = write_place(Path(folder))
        methods = {f"adapter{i}": DoRA(r=2) if i % 2 else LoRA(r=4) for i in range(ADAPTERS)}
        write_adapters(place / "base", place / "adapters", methods)
        write_adapters(place / "base", place / "others", {"adapter0": DoRA(r=3)})
        running = Running(place / "base", place / "state", place / "adapters", parallel_jobs=4)
        running.place = place  # type: ignore[attr-defined]
        for name in args.cases or CASES:
            began = time.monotonic()
            found = asyncio.run(CASES[name](running, args.scale))  # type: ignore[arg-type]
            seconds = round(time.monotonic() - began, 1)
            print(json.dumps({"case": name, "scale": args.scale, **found, "seconds": seconds}), flush=True)
        running.close()


if __name__ == "__main__":
    main()
