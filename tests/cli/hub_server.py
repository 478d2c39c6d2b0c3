"""A model hub on this machine: the requests that huggingface_hub sends to create a repository and commit files to it.

Large files go through the Git LFS batch call and a PUT, small ones inside the commit, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

TOKEN = "hf_testing"


class Hub:
    """The state of the hub: repositories with branches and their files, and faults to show.

    ``refuse`` answers the next commit with that status; ``corrupt`` names a file that is stored with another content.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.visibility: dict[str, str | None] = {}
        self.messages: list[str] = []
        self.pull_requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.refuse: int | None = None
        self.corrupt: str | None = None
        self.url = ""

    def create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{body.get('organization') or 'me'}/{body['name']}"
        answer = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return 409, answer
        self.repositories[name] = {"main": {}}
        self.visibility[name] = body.get("visibility")
        return 200, answer

    def branch(self, name: str, branch: str) -> tuple[int, dict[str, Any]]:
        if branch in self.repositories[name]:
            return 409, {"error": "exists"}
        self.repositories[name][branch] = dict(self.repositories[name]["main"])
        return 200, {}

    def batch(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for item in body["objects"]:
            actions = {"upload": {"href": f"{self.url}/objects/{item['oid']}"}}
            objects.append(item if item["oid"] in self.objects else {**item, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]], pull_request: bool) -> dict[str, Any]:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        if self.corrupt in files:
            files[str(self.corrupt)] = files[str(self.corrupt)][:-1] + b"\0"
        oid = hashlib.sha1(json.dumps(sorted(files)).encode()).hexdigest()
        target = f"refs/pr/{len(self.pull_requests) + 1}" if pull_request else branch
        self.repositories[name].setdefault(target, {}).update(files)
        self.repositories[name][oid] = self.repositories[name][target]
        page = f"{self.url}/{name}/discussions/{len(self.pull_requests) + 1}"
        if pull_request:
            self.pull_requests.append(page)
        return {
            "commitUrl": f"{self.url}/{name}/commit/{oid}",
            "commitOid": oid,
            "pullRequestUrl": page if pull_request else None,
        }

    def paths(self, name: str, revision: str, wanted: list[str]) -> list[dict[str, Any]]:
        files = self.repositories[name][revision]
        return [_record(path, files[path]) for path in wanted if path in files]


def _large(path: str) -> bool:
    return path.endswith(".safetensors")


def _record(path: str, data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    if _large(path):
        digest = hashlib.sha256(data).hexdigest()
        record |= {"oid": "0" * 40, "lfs": {"oid": digest, "size": len(data), "pointerSize": 130}}
    else:
        record["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return record


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Requests(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_PUT(self) -> None:
            data = self.body()
            hub.objects[hashlib.sha256(data).hexdigest()] = data
            self.answer(200, {})

        def do_GET(self) -> None:
            self.answer(404, {"error": "Repository not found"})

        def do_POST(self) -> None:
            body = self.body()
            path, _, query = self.path.partition("?")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid username or password."})
                return
            parts = [unquote(part) for part in path.strip("/").split("/")]
            if parts[:3] == ["api", "repos", "create"]:
                self.answer(*hub.create(json.loads(body)))
            elif parts == ["api", "validate-yaml"]:
                self.answer(200, {"errors": [], "warnings": []})
            elif parts[2:] == ["info", "lfs", "objects", "batch"]:
                self.answer(200, hub.batch(f"{parts[0]}/{parts[1].removesuffix('.git')}", json.loads(body)))
            elif parts[:2] == ["api", "models"]:
                name, call = f"{parts[2]}/{parts[3]}", parts[4]
                self.model(name, call, "/".join(parts[5:]), body, "create_pr=1" in query)
            else:
                self.answer(404, {"error": f"no such call: {path}"})

        def model(self, name: str, call: str, revision: str, body: bytes, pull_request: bool) -> None:
            if call == "branch":
                self.answer(*hub.branch(name, revision))
            elif call == "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = [
                    {"path": path, "uploadMode": "lfs" if _large(path) else "regular", "shouldIgnore": False}
                    for path in files
                ]
                self.answer(200, {"files": modes})
            elif call == "commit" and hub.refuse is not None:
                self.answer(hub.refuse, {"error": "This repository is over its limit"})
            elif call == "commit":
                lines = [json.loads(line) for line in body.splitlines()]
                self.answer(200, hub.commit(name, revision, lines, pull_request))
            elif call == "paths-info":
                self.answer(200, hub.paths(name, revision, parse_qs(body.decode())["paths"]))
            else:
                self.answer(404, {"error": f"no such call: {call}"})

    return Requests


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens on the loopback interface until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
