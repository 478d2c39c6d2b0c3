"""Held-out losses of short runs over schedules, learning rates and clipping at several batch sizes: what the defaults should be.

    python -m bench.defaults --out runs/defaults --rows e2e=e2e.jsonl --rows seeds=seeds.jsonl
    python -m bench.defaults --out runs/defaults --table

Each run is one line of ``results.jsonl`` with all of its held-out losses, written when it ends. The same command continues with the
runs that are missing. The rows of Python's documentation and the generated multiples are always there; the latter can be learnt
completely, which is where a rate that is too high shows.
"""

from __future__ import annotations

import veneer  # isort: skip  (before torch, as in a command: it limits how long OpenMP's threads spin)

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.adapter_hash import rows as multiples
from veneer.config import default_learning_rate
from veneer.data.stdlib_docs import stdlib_pairs
from veneer.training.run.console import Console

STEPS = {2: 120, 8: 60, 32: 24}
SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {"schedule": "constant"},
    "linear": {"schedule": "linear"},
    "constant, rate by batch": {"schedule": "constant", "by_batch": True},
    "linear, rate by batch": {"schedule": "linear", "by_batch": True},
    "cosine": {"schedule": "cosine"},
    "constant, clip 0.3": {"schedule": "constant", "clip": 0.3},
}
LENGTH, TRAIN, HELD_OUT = 64, 400, 24
FULL_RATE_BATCH = 32
"""With ``by_batch`` the learning rate grows with the square root of the batch size, up to the default at this size."""

Rows = list[dict[str, Any]]


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument(
        "--rows", action="append", default=[], metavar="NAME=FILE", help="a further data set (JSON lines)"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs")
    args = parser.parse_args()
    results: Path = args.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    if args.table:
        print("\n".join(table(done)))
        return
    files = write_rows(args.out / "rows", dict(part.split("=", 1) for part in args.rows))
    base = veneer.load_base("smollm2-135m")
    rate = default_learning_rate(base.model.config.hidden_size, base.model.config.model_type)
    known = {(one["setting"], one["batch_size"], one["data"]) for one in done}
    for setting, batch_size, data in plan(list(files)):
        if (setting, batch_size, data) in known:
            continue
        began = time.monotonic()
        losses = run(base, args.out / "run", files[data], SETTINGS[setting], batch_size, rate)
        found = {"setting": setting, "batch_size": batch_size, "data": data, "losses": losses}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**found, "seconds": round(time.monotonic() - began)}) + "\n")


def plan(names: list[str]) -> Iterator[tuple[str, int, str]]:
    """All runs; the cheap batch sizes of every setting first. At the full rate's batch size a rate by batch is the full rate."""
    for sizes in ((2, 8), (32,)):
        for setting, options in SETTINGS.items():
            if not options.get("by_batch") or FULL_RATE_BATCH not in sizes:
                yield from ((setting, size, name) for size in sizes for name in names)


def run(base: Any, out: Path, files: dict[str, Path], setting: dict[str, Any], size: int, rate: float) -> list[Any]:
    """[step, held-out loss] at each evaluation of one run."""
    options = {key: value for key, value in setting.items() if key != "by_batch"}
    scale = min(1.0, (size / FULL_RATE_BATCH) ** 0.5) if setting.get("by_batch") else 1.0
    shutil.rmtree(out, ignore_errors=True)
    result = veneer.train(
        {
            **options,
            "data": str(files["train"]),
            "valid": str(files["valid"]),
            "out": str(out),
            "batch_size": size,
            "steps": STEPS[size],
            "eval_every": STEPS[size] // 6,
            "learning_rate": rate * scale,
            "chat_template": "chatml",
            "max_length": LENGTH,
            "truncate": "drop",
            "plan": False,
            "checkpoint_minutes": None,
        },
        base=base,
        console=Console(),
    )
    return [[step, round(loss, 4)] for step, loss in next(iter(result.jobs.values())).losses]


def write_rows(folder: Path, given: dict[str, str]) -> dict[str, dict[str, Path]]:
    """Write short rows of each data set for training and held out; returns the files."""
    docs, held = stdlib_pairs(90)
    kinds: dict[str, tuple[Rows, Rows]] = {
        "docs": ([{"messages": row["messages"]} for row in docs], [{"messages": row["messages"]} for row in held]),
        "multiples": (multiples(64), multiples(64)),
    }
    for name, path in given.items():
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        kinds[name] = ([row for i, row in enumerate(rows) if i % 8], rows[::8])
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Path]] = {}
    for name, parts in kinds.items():
        files[name] = {}
        for part, rows, most in zip(("train", "valid"), parts, (TRAIN, HELD_OUT), strict=True):
            short = [row for row in rows if len(json.dumps(row)) < 4 * LENGTH]
            random.Random(0).shuffle(short)
            path = folder / f"{name}-{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in short[:most]), encoding="utf-8")
            files[name][part] = path
    return files


def table(done: list[dict[str, Any]]) -> list[str]:
    """A row per data set and batch size: last (best) held-out loss under each setting."""
    found = {(one["data"], one["batch_size"], one["setting"]): one["losses"] for one in done}
    settings = [name for name in SETTINGS if any(key[2] == name for key in found)]
    lines = [f"| data | batch size | base | {' | '.join(settings)} |", "|---" * (3 + len(settings)) + "|"]
    for data, size in sorted({key[:2] for key in found}):
        cells, base = [], ""
        for setting in settings:
            losses = found.get((data, size, setting))
            if losses is None:
                cells.append("")
                continue
            base = f"{losses[0][1]:.3f}"
            cells.append(f"{losses[-1][1]:.3f} ({min(loss for _, loss in losses[1:]):.3f})")
        lines.append(f"| {data} | {size} | {base} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
