"""Losses of the first steps at several ranks, with one learning rate (LoRA Without Regret: the curves of all ranks begin alike).

    python -m evidence.first_steps --data DIR --out runs/evidence/first_steps

With the scale lora_alpha / r the update is a mean over r rank-one parts, and the first step of Adam gives each part the same size. So the
expected first update does not depend on the rank; only its spread does. The table has the training losses of the same batches, as means
over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from evidence.records import machine, markdown
from veneer.training import train
from veneer.training.run.console import Console

RANKS = (1, 4, 16, 64)
STEPS = (1, 5, 10, 20, 40)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with a train file of text and label"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="minilm-l6", help="an encoder")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [{"name": f"r{rank}-seed{seed}", "r": rank, "seed": seed} for rank in RANKS for seed in range(args.seeds)]
    options = {"base": args.base, "task": "classification", "out": args.out, "jobs": jobs, "threads": 1, "plan": False}
    steps = {"steps": STEPS[-1], "batch_size": 16, "learning_rate": args.learning_rate, "schedule": "constant"}
    train({**options, **steps, "data": (next(args.data.glob("train.*")),)}, console=Console())
    print(f"{machine()}\n\n{table(args.out / 'metrics', args.seeds)}")


def table(metrics: Path, seeds: int) -> str:
    """The mean losses around some steps, by rank, and the largest difference of two ranks."""
    curves = {rank: [losses(metrics / f"r{rank}-seed{seed}.jsonl") for seed in range(seeds)] for rank in RANKS}
    means = {rank: [statistics.fmean(run[step] for run in runs) for step in STEPS] for rank, runs in curves.items()}
    rows = [[str(rank), *(f"{loss:.4f}" for loss in found)] for rank, found in means.items()]
    widest = [max(column) - min(column) for column in zip(*means.values(), strict=True)]
    rows.append(["largest difference", *(f"{difference:.4f}" for difference in widest)])
    return markdown(["rank", *(f"step {step}" for step in STEPS)], rows)


def losses(file: Path) -> dict[int, float]:
    """The training loss by step."""
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


if __name__ == "__main__":
    main()
