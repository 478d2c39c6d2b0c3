"""SHA-256 of adapters trained for twenty steps on the embedded model: LoRA, DoRA with dropout, and four mixed jobs.

    python -m bench.adapter_hash            # in two checkouts, on one machine: equal lines mean equal bits

Use it to check that a change of the code does not change results. The rows are generated, so no data is needed.
"""

from __future__ import annotations

import veneer  # isort: skip  (before torch, as in a command: it limits how long OpenMP's threads spin)

import contextlib
import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

STEPS = 20
CASES: dict[str, list[dict[str, Any]]] = {
    "lora": [{}],
    "dora_dropout": [{"method": "dora", "lora_dropout": 0.1}],
    "four_jobs": [{}, {"method": "dora", "r": 4}, {"r": 64, "lora_dropout": 0.05}, {"method": "dora", "r": 8}],
}


def rows(count: int = 64) -> list[dict[str, Any]]:
    """Conversations of uneven lengths."""
    numbers = [(7 * i) % 23 for i in range(count)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"List the first {n + 2} multiples of {n + 1}."},
                {"role": "assistant", "content": ", ".join(str(k * (n + 1)) for k in range(1, n + 3))},
            ]
        }
        for n in numbers
    ]


def digests(folder: Path) -> list[str]:
    """Hashes of the tensors of every adapter below a folder, sorted by path, without metadata."""
    from safetensors import safe_open

    found = []
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        if "checkpoints" in path.parts:
            continue
        digest = hashlib.sha256()
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                digest.update(name.encode())
                digest.update(file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
        found.append(f"{path.relative_to(folder).parent}: {digest.hexdigest()[:24]}")
    return found


def main() -> None:
    """Train each case and print its hashes."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = work / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
        for case, jobs in CASES.items():
            out = work / case
            common = {"data": str(data), "steps": STEPS, "batch_size": 4, "share": 1024, "plan": False}
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if len(jobs) == 1:
                    veneer.train({**common, **jobs[0], "out": str(out)})
                else:
                    named = [{"name": f"job{i}", **job} for i, job in enumerate(jobs)]
                    veneer.train({**common, "jobs": named, "out": str(out)})
            for line in digests(out):
                print(case, line)


if __name__ == "__main__":
    main()
