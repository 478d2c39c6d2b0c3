"""Keys on every route, hosts and origins, ids, limits on bodies and on the time that clients take."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route
from tests.serve.api.made import ADMIN_KEY, KEY, Running, wait

from veneer.serve.api.app import create_routes
from veneer.serve.api.guard import OPEN_ROUTES
from veneer.serve.limits import ServeLimits

QUICK = ServeLimits(header_seconds=0.5, body_seconds=0.5, write_seconds=1.0, max_body_bytes=100_000)


@pytest.fixture(scope="module")
def server(place: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with little patience."""
    running = Running(place / "base", tmp_path_factory.mktemp("state"), adapters, limits=QUICK)
    yield running
    running.close()


def raw(server: Running, data: bytes, *, seconds: float = 10) -> bytes:
    """What the server answers to these bytes until it closes the connection or is silent."""
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=seconds) as connection:
        connection.sendall(data)
        found = b""
        try:
            while piece := connection.recv(65_536):
                found += piece
                if b"\r\n\r\n" in found and b"transfer-encoding" not in found.lower():
                    length = re.search(rb"content-length: (\d+)", found.lower())
                    if length and len(found.split(b"\r\n\r\n", 1)[1]) >= int(length.group(1)):
                        break
        except (TimeoutError, ConnectionResetError):
            pass
        return found


def head(server: Running, *lines: str, method: str = "GET", path: str = "/v1/models", host: str | None = None) -> bytes:
    """A request without a body."""
    host = f"127.0.0.1:{server.server.port}" if host is None else host
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


def routes(server: Running) -> list[tuple[str, str]]:
    """(method, path) of every route of the application."""
    app = create_routes(server.server.context)
    found = [(method, route.path) for route in app.routes if isinstance(route, Route) for method in route.methods or ()]
    schema = app.openapi()["paths"]
    found += [(method.upper(), path) for path, methods in schema.items() for method in methods]
    return sorted(set(found))


def test_every_route_but_health_needs_a_key(server: Running) -> None:
    """No route answers without a key, with a wrong one, in the query, or with two; health and readiness do."""
    listed = routes(server)
    assert len(listed) > 25 and ("POST", "/v1/chat/completions") in listed
    with server.http(None) as http:
        for method, path in listed:
            url = re.sub(r"\{[^}]*\}", "x", path)
            for headers in ({}, {"authorization": "Bearer wrong-key"}, {"authorization": f"Basic {KEY}"}):
                answer = http.request(method, url, headers=headers, params={"api_key": KEY})
                assert (answer.status_code == 401) == (path not in OPEN_ROUTES), (method, path, answer.status_code)
                if answer.status_code == 401 and method != "HEAD":
                    assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").text == "ok\n" and http.get("/ready").status_code == 200
    twice = raw(server, head(server, f"Authorization: Bearer {KEY}", f"Authorization: Bearer {KEY}"))
    assert b" 400 " in twice
    assert b" 200 " in raw(server, head(server, f"authorization: bearer {KEY}"))


def test_administration_needs_the_admin_key(server: Running) -> None:
    """Adapters are loaded and unloaded with the admin key only, by registered names and not by paths."""
    with server.http() as user, server.http(ADMIN_KEY) as admin:
        assert user.post("/v1/unload_lora_adapter", json={"lora_name": "tone"}).status_code == 403
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "tone"}).json()["loaded"] is False
        asked = {"model": "tone", "prompt": "a", "max_tokens": 1}
        missing = user.post("/v1/completions", json=asked)
        assert missing.status_code == 404 and "load_lora_adapter" in missing.json()["error"]["message"]
        assert admin.post("/v1/load_lora_adapter", json={"lora_name": "tone"}).json()["loaded"] is True
        assert user.post("/v1/completions", json=asked).status_code == 200
        body = {"lora_name": "x", "lora_path": "/etc"}
        path = admin.post("/v1/load_lora_adapter", json=body)
        assert path.status_code == 400 and path.json()["error"]["param"] == "lora_path"
        for name in ("../state", "/etc", "none", "base"):
            assert admin.post("/v1/load_lora_adapter", json={"lora_name": name}).status_code == 404
        assert user.delete("/v1/models/tone").json()["error"]["code"] == "not_deletable"


def test_health_tells_of_an_engine_that_failed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose engine has failed is not healthy, without the error's text for those who have no key."""
    with server.http(None) as http:
        monkeypatch.setattr(server.engine, "failure", "the engine failed (a secret); restart the server")
        for path in ("/health", "/ready"):
            answer = http.get(path)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_failed"
            assert "secret" not in answer.text
        monkeypatch.undo()
        assert http.get("/health").text == "ok\n"


@pytest.mark.parametrize(
    "host", ["evil.com", "127.0.0.1.evil.com", "localhost.evil.com:{port}", "127.0.0.1", "", "[::1]evil"]
)
def test_foreign_hosts_are_refused(server: Running, host: str) -> None:
    """A request under another host name is refused with a key too: a page that rebinds its name cannot reach the server."""
    asked = head(server, f"Authorization: Bearer {KEY}", host=host.format(port=server.server.port))
    assert re.match(rb"HTTP/1.1 4(21|00) ", raw(server, asked))


def test_foreign_origins_are_refused(server: Running) -> None:
    """A request from a page of another origin is refused, and no answer allows one."""
    key = f"Authorization: Bearer {KEY}"
    for origin in ("http://evil.com", "null", "file://", f"http://127.0.0.1.evil.com:{server.server.port}"):
        answer = raw(server, head(server, key, f"Origin: {origin}"))
        assert b" 403 " in answer and b"access-control" not in answer.lower()
    assert b" 200 " in raw(server, head(server, key, f"Origin: {server.root}"))
    assert b" 400 " in raw(server, head(server, key, "Host: evil.com"))


def test_answers_have_ids_and_envelopes(server: Running) -> None:
    """Each answer has the id of its request; errors have all four fields."""
    with server.http() as http:
        assert http.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        for bad in ("a b", "x" * 80, "<script>"):
            assert re.fullmatch(
                "req-[0-9a-f]{24}", http.get("/v1/models", headers={"x-request-id": bad}).headers["x-request-id"]
            )
        for answer, status in (
            (http.get("/none"), 404),
            (http.put("/v1/models"), 405),
            (http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}), 400),
            (http.get("/v1/files", params={"color": "red"}), 400),
        ):
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_large_bodies_are_refused_at_once(server: Running) -> None:
    """A body beyond the limit is refused by its length, and while it arrives; compressed ones are not unpacked."""
    key = f"Authorization: Bearer {KEY}"
    post: Any = {"method": "POST", "path": "/v1/completions"}
    began = time.monotonic()
    assert b" 413 " in raw(server, head(server, key, "Content-Length: 1000000000", **post))
    chunked = head(server, key, "Transfer-Encoding: chunked", "Content-Type: application/json", **post)
    chunk = b"ea60\r\n" + b"x" * 60_000 + b"\r\n"
    assert b" 413 " in raw(server, chunked + chunk * 4)
    assert b" 415 " in raw(server, head(server, key, "Content-Encoding: gzip", "Content-Length: 10", **post))
    assert time.monotonic() - began < 5
    many = [f"X-{i}: {'y' * 100}" for i in range(2000)]
    assert re.match(rb"HTTP/1.1 4\d\d ", raw(server, head(server, key, *many)))


def test_half_requests_are_cut(server: Running) -> None:
    """Connections with half a header or half a body are closed soon, and health answers meanwhile."""
    address = ("127.0.0.1", server.server.port)
    halves = [socket.create_connection(address, timeout=10) for _ in range(60)]
    for i, connection in enumerate(halves):
        whole = head(
            server, f"Authorization: Bearer {KEY}", "Content-Length: 50", method="POST", path="/v1/completions"
        )
        connection.sendall(b"GET / HT" if i % 2 else whole + b"{")
    with server.http() as http:
        began = time.monotonic()
        assert http.get("/health").status_code == 200
        assert time.monotonic() - began < 0.5
    began = time.monotonic()
    for i, connection in enumerate(halves):
        try:
            found = connection.recv(1000)
        except ConnectionResetError:
            found = b""
        assert found == b"" if i % 2 else b" 408 " in found
        connection.close()
    assert time.monotonic() - began < 4


@pytest.mark.slow
def test_slow_reader_is_cut(server: Running) -> None:
    """A client that reads nothing of a long answer loses its connection, and the engine its request."""
    wait(server.idle)
    body = json.dumps(
        {"model": "base", "prompt": "a", "max_tokens": 200, "n": 40, "stream": True, "logprobs": 5, "ignore_eos": True}
    )
    asked = head(
        server, f"Authorization: Bearer {KEY}", "Content-Type: application/json", f"Content-Length: {len(body)}",
        method="POST", path="/v1/completions",
    )  # fmt: skip
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.server.port))
    connection.sendall(asked + body.encode())
    wait(lambda: not server.idle(), 10)
    wait(server.idle, 90)
    time.sleep(1.5)
    connection.settimeout(5)
    found = b""
    try:
        while piece := connection.recv(1 << 20):
            found += piece
    except ConnectionResetError:
        pass
    connection.close()
    assert b"[DONE]" not in found


def test_log_has_no_key_and_no_prompt(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """A line of the log has method, path, status and time, and nothing that the client wrote."""
    with caplog.at_level("DEBUG", logger="veneer"), server.http() as http:
        http.post("/v1/completions", json={"model": "base", "prompt": "my secret", "max_tokens": 1})
        http.post("/v1/completions", json={"model": "my secret", "prompt": 1})
        wait(lambda: "/v1/completions 400" in caplog.text)
    assert "/v1/completions 200" in caplog.text
    assert "secret" not in caplog.text and KEY not in caplog.text
