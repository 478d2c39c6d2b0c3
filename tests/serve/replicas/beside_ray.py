"""Checks of the application in a real Ray cluster, run beside it: python -m tests.serve.replicas.beside_ray PLACE"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import openai
from tests.serve.api.made import ADMIN_KEY, KEY, wait
from tests.training.ray_nodes import ADDRESS

PORT = 8123
URL = f"http://127.0.0.1:{PORT}"


def replica_processes() -> list[int]:
    """Processes of replicas in this network namespace."""
    own, found = Path("/proc/self/ns/net").readlink(), []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and b"ServeReplica:veneer:Replica" in (place / "cmdline").read_bytes():
                found += [int(place.name)] if (place / "ns/net").readlink() == own else []
        except OSError:
            pass
    return found


def metrics() -> str:
    """What the gateway reports of all replicas."""
    return httpx2.get(f"{URL}/metrics", headers={"authorization": f"Bearer {KEY}"}, trust_env=False, timeout=60).text


def answers_by_replica() -> dict[str, Counter[str]]:
    """{adapter: tokens by replica}."""
    found: dict[str, Counter[str]] = {}
    for line in metrics().splitlines():
        if line.startswith("veneer:generation_tokens_total{"):
            labels = dict(pair.split("=") for pair in line[line.index("{") + 1 : line.index("}")].split(","))
            found.setdefault(labels["adapter"].strip('"'), Counter())[labels["replica"]] = int(float(line.split()[-1]))
    return found


def stream(client: openai.OpenAI, model: str, began: threading.Event, ends: list[str]) -> None:
    """How a long stream ends: with a finish reason, an error, or neither."""
    how = "neither"
    try:
        asked: dict[str, Any] = {"model": model, "prompt": "The rain", "max_tokens": 240, "stream": True}
        for chunk in client.completions.create(**asked, extra_body={"ignore_eos": True}):
            began.set()
            how = "complete" if chunk.choices and chunk.choices[0].finish_reason else how
    except (openai.APIError, httpx2.HTTPError) as error:
        how = f"error: {type(error).__name__}"
    began.set()
    ends.append(how)


def check(client: openai.OpenAI, expected: dict[str, str]) -> None:
    """All of the checks."""
    assert {model.id for model in client.models.list()} == set(expected)

    def text(model: str) -> str:
        return client.completions.create(model=model, prompt="The rain", max_tokens=8, temperature=0).choices[0].text

    assert {model: text(model) for model in expected} == expected
    admin = openai.OpenAI(base_url=f"{URL}/v1", api_key=ADMIN_KEY, timeout=120)
    loaded = admin.post("/load_lora_adapter", body={"lora_name": "sql"}, cast_to=dict[str, Any])
    assert loaded["loaded"] is True
    time.sleep(3)  # until the router knows which replica has which adapter
    before = answers_by_replica()
    for _ in range(10):
        assert text("sql") == expected["sql"] and text("style") == expected["style"]
    after = answers_by_replica()
    spread = {name: [n for n in (after[name] - before.get(name, Counter())).values() if n] for name in ("sql", "style")}
    print("tokens by replica", spread, flush=True)
    assert all(len(counts) == 1 for counts in spread.values()), spread

    began, ends = [threading.Event() for _ in range(12)], []
    threads = [
        threading.Thread(target=stream, args=(client, ("base", "sql", "style")[i % 3], one, ends))
        for i, one in enumerate(began)
    ]
    for thread in threads:
        thread.start()
    assert all(one.wait(60) for one in began)
    victims = replica_processes()
    assert len(victims) == 2, victims
    os.kill(victims[0], signal.SIGKILL)
    killed = time.monotonic()
    assert {model: text(model) for model in expected} == expected  # at once, by the replica that is left
    answered = time.monotonic() - killed
    for thread in threads:
        thread.join(120)
    print("ends of streams", Counter(ends), f"; answers {answered:.1f} s after the kill", flush=True)
    assert "neither" not in ends and len(ends) == 12
    wait(lambda: len(set(replica_processes()) - {victims[0]}) == 2, 120)
    wait(
        lambda: len(set(re.findall(r'replica="([^"]+)"', metrics()))) == 2, 120
    )  # the new one has no answers to count yet
    assert {model: text(model) for model in expected} == expected


def main() -> int:
    """Start the application, check it, and end it."""
    place = Path(sys.argv[1])
    expected = json.loads((place / "expected.json").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "veneer", "serve", "--cluster", ADDRESS, "--replicas", "2", "--port", str(PORT)]
    command += ["--base", str(place / "base"), "--adapters", str(place / "adapters"), "--dtype", "float32"]
    command += ["--state", str(place / "state"), "--device", "cpu", "--drain", "2"]
    environment = {**os.environ, "VENEER_API_KEY": KEY, "VENEER_ADMIN_KEY": ADMIN_KEY}
    with (place / "output").open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait(lambda: b"Ctrl-C" in (place / "output").read_bytes() or server.poll() is not None, 300)
        assert server.poll() is None, (place / "output").read_text(encoding="utf-8")
        check(openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, timeout=120, max_retries=0), expected)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not replica_processes()
        print("all checks passed", flush=True)
    finally:
        server.kill()
        print((place / "output").read_text(encoding="utf-8"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
