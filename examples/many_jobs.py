"""Train three adapters on one base in one run, and compare them with the base.

python examples/many_jobs.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import veneer


def write_rows(folder: Path) -> dict[str, Path]:
    """Write two small data sets: sums, and words in upper case."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["amber", "basil", "cedar", "delta", "ember", "frost", "grove", "hazel", "ivory", "jolly"]
    sets = {
        "sums": [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(12) for b in range(8)],
        "upper": [{"prompt": f"shout: {a} {b}", "completion": f" {a} {b}".upper()} for a in words for b in words],
    }
    files = {}
    for name, rows in sets.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def main(model: str = "smollm2-135m", out: str = "runs/many_jobs", steps: int = 40) -> dict[str, tuple[float, float]]:
    """Train; returns {job: (held-out loss of the base, of the adapter)}."""
    files = write_rows(Path(out).with_name(f"{Path(out).name}-data"))
    result = veneer.train(
        {
            "base": model,
            "out": out,
            "steps": steps,
            "batch_size": 8,
            "valid_fraction": 0.1,
            "jobs": [
                {"name": "sums", "data": [str(files["sums"])]},
                {"name": "upper", "data": [str(files["upper"])]},
                {"name": "upper-dora", "data": [str(files["upper"])], "method": "dora", "r": 4},
            ],
        }
    )
    losses = {name: (job.losses[0][1], job.losses[-1][1]) for name, job in result.jobs.items()}
    for name, (before, after) in losses.items():
        print(f"{name}: held-out loss {before:.3f} -> {after:.3f}, adapter in {result.jobs[name].adapter}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:3])
