"""Memory, checkpoint and time of LoRA against full fine-tuning, beside the formulas (LoRA, arXiv 2106.09685, sections 1 and 4).

    python -m evidence.resources --out runs/evidence/resources
    python -m evidence.resources --out runs/evidence/resources --table

Each method takes steps on the same examples in a process of its own. Measured: trainable parameters, bytes of the saved adapter,
peak memory over the loaded base, CPU seconds of a forward, backward and optimizer step. Formulas: 16 bytes for a trained
parameter in fp32 with AdamW (weight, gradient, two moments), 4 for a frozen one; 4N + 6P products for a token against 6N.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from evidence.records import Records, machine, markdown
from veneer.config import TrainOptions
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.models.load import load_base
from veneer.training.process_memory import peak_of, resident
from veneer.training.run.setup import Setup, set_up

TOKENS, LENGTH, STEPS = 512, 64, 4
CONTESTANTS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora r=4 q,v": {"r": 4, "target_modules": ("q_proj", "v_proj")},
    "lora r=16": {"r": 16},
    "dora r=16": {"method": "dora", "r": 16},
}


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--table", action="store_true", help="print the table of the finished measurements")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.base, CONTESTANTS[args.one])))
        return
    records = Records(args.out / "results.jsonl")
    for label in () if args.table else CONTESTANTS:
        if label not in records:
            words = [sys.executable, "-m", "evidence.resources", "--out", str(args.out), "--base", args.base]
            found = subprocess.run([*words, "--one", label], capture_output=True, text=True, check=True)
            records.add(label, **json.loads(found.stdout.splitlines()[-1]), machine=machine())
    print(table(records))


def measure(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """One method's figures, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(json.dumps({"text": "one two three four"}) + "\n")
        given = TrainOptions(data=(rows,), base=name, dtype="float32", out=Path(folder) / "run", name="a", **options)
        base = load_base(name, dtype="float32")
        with set_up(given, {"a": given}, base, lambda line: None) as setup:
            start = resident()
            with peak_of() as peak:
                seconds = [step(setup) for _ in range(STEPS)]
            job, bank = setup.jobs[0], setup.bank
            bank.save("a", Path(folder) / "adapter")
            disk = sum(file.stat().st_size for file in (Path(folder) / "adapter").glob("*.safetensors"))
            total = sum(parameter.numel() for parameter in base.model.parameters())
            trained = sum(parameter.numel() for parameter in job.parameters)
    return {"total": total, "trained": trained, "disk": disk, "peak": peak.bytes - start, "seconds": min(seconds[1:])}


def step(setup: Setup) -> float:
    """CPU seconds of one step over ``TOKENS`` tokens."""
    job = setup.jobs[0]
    examples = [
        Example(tuple(500 + (7 * at * (row + 1)) % 9000 for at in range(LENGTH)), (0.0, *[1.0] * (LENGTH - 1)))
        for row in range(TOKENS // LENGTH)
    ]
    start = time.process_time()
    for loss in setup.stepper.forward_backward(make_batch(examples, job.name)).values():
        job.add(loss)
    job.optim_step()
    return time.process_time() - start


def table(records: Records) -> str:
    """The finished measurements beside the formulas."""
    full = records.known.get("full")
    rows = []
    for label, one in records.known.items():
        states, weights = 16 * one["trained"], 4 * (one["total"] - one["trained"])
        products = (6 * one["total"] if label == "full" else 4 * one["total"] + 6 * one["trained"]) / (6 * one["total"])
        rows.append(
            [
                label,
                f"{one['trained']:,}",
                f"{one['disk'] / 1e6:,.2f} MB",
                f"{(states + weights) / 1e9:.2f} GB",
                f"{one['peak'] / 1e9:.2f} GB",
                f"{one['seconds']:.2f} s",
                "-" if full is None else f"{one['seconds'] / full['seconds']:.3f}",
                f"{products:.3f}",
            ]
        )
    header = [
        "method",
        "trained",
        "on disk",
        "weights and optimizer by the formula",
        "peak over the base",
        "CPU s a step",
    ]
    last = next(reversed(records.known.values()), {})
    return f"{markdown([*header, 'of full', 'products of full'], rows)}\n\n{last.get('machine', '')}; load {last.get('load', '')}"


if __name__ == "__main__":
    main()
