"""Measurements that survive a stop: one JSON line each, with the machine and its load."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


class Records:
    """The measurements of one script. A key that is there is not measured again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.known: dict[str, dict[str, Any]] = {}
        for line in lines:
            entry = json.loads(line)
            self.known[entry["key"]] = entry

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def add(self, key: str, **values: Any) -> None:
        """Append a measurement."""
        entry = {"key": key, **values, "load": round(os.getloadavg()[0], 1)}
        self.known[key] = entry
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def machine() -> str:
    """The processor, the threads in use and the versions, for a page."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        name = next(lines, name).partition(":")[2].strip() or name
    return f"{name}, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
