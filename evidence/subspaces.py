"""Directions that LoRA learns at two ranks and with two seeds: their overlap, and their amplification (arXiv 2106.09685, section 7).

    python -m evidence.subspaces --data train.csv --out runs/evidence/subspaces
    python -m evidence.subspaces --out runs/evidence/subspaces --table

Three adapters are trained on the query and value layers of a classifier: rank 8, and rank 64 with two seeds. Read off:

    phi(i, j)        overlap of the first i and j input directions of A at two ranks (1: one span holds the other); chance for random spans
    amplification    ||dW||_F / ||U^T W V||_F, U and V the directions of dW: how much more of them the change has than the weight itself
"""

from __future__ import annotations

import veneer  # isort: skip  (before torch, as in a command)

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evidence.records import Records, machine, markdown
from veneer.analysis.subspace import phi
from veneer.models.load import load_base
from veneer.training import train
from veneer.training.run.console import Console

RUNS = {"r8": {"r": 8, "seed": 0}, "r64": {"r": 64, "seed": 0}, "r64 other seed": {"r": 64, "seed": 1}}
PAIRS = {"r 8 and 64": ("r8", "r64"), "two seeds, r 64": ("r64", "r64 other seed"), "random": ("random", "random 2")}
TOP = (1, 2, 4, 8)


def main() -> None:
    """Train and measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl and of the run")
    parser.add_argument("--base", default="minilm-l6", help="an encoder")
    parser.add_argument("--data", metavar="[NAME=]PATH", help="rows of text and label, or a folder with a train file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--targets", default="query,value")
    parser.add_argument("--table", action="store_true", help="print the table of the finished measurements")
    args = parser.parse_args()
    records = Records(args.out / "results.jsonl")
    if not args.table:
        measure(args, records)
    print(table(records))


def measure(args: argparse.Namespace, records: Records) -> None:
    """Train the adapters as jobs of one run, which resumes, and read the overlaps."""
    torch.set_num_threads(1)
    targets = tuple(args.targets.split(","))
    jobs = [{"name": name.replace(" ", "-"), **options} for name, options in RUNS.items()]
    common: dict[str, Any] = {"base": args.base, "dtype": "float32", "out": args.out / "run", "threads": 1}
    steps = {"steps": args.steps, "batch_size": 16, "learning_rate": 5e-4}
    given = {
        **common,
        **steps,
        "task": "classification",
        "data": (args.data.rpartition("=")[2],),
        "jobs": jobs,
        "target_modules": targets,
    }
    result = train(given, console=Console())
    base = load_base(args.base, dtype="float32", task="classification")
    bank = veneer.attach(base.model)
    for name in RUNS:
        bank.load(result.jobs[name.replace(" ", "-")].adapter, name=name.replace(" ", "-"))
    for site in bank[next(iter(bank))].tensors:
        key = f"{site} {args.steps}"
        if key in records:
            continue
        spans = {name: input_directions(bank[name.replace(" ", "-")].tensors[site]["lora_A"]) for name in RUNS}
        generator = torch.Generator().manual_seed(0)
        wide = next(iter(spans.values())).shape[0]
        for name in ("random", "random 2"):
            spans[name] = torch.linalg.qr(torch.randn(wide, 64, generator=generator))[0]
        overlaps = {
            pair: {str(i): float(phi(spans[one], spans[other])[i - 1, i - 1]) for i in TOP}
            for pair, (one, other) in PAIRS.items()
        }
        weight = bank.sites[site].weight_2d
        amplified = {}
        for name in ("r8", "r64"):
            adapter = bank[name]
            amplified[name] = amplification(adapter.delta_2d(site), weight, adapter.rank(site))
        records.add(key, site=site, overlaps=overlaps, amplified=amplified, machine=machine())


def input_directions(a_RK: Tensor) -> Tensor:
    """Right singular vectors of A as columns [K, R], the largest first."""
    return torch.linalg.svd(a_RK.detach().double(), full_matrices=False)[2].T.float()


def amplification(delta_OK: Tensor, weight_OK: Tensor, rank: int) -> float:
    """||dW||_F / ||U^T W V||_F with the first ``rank`` singular vectors of dW."""
    u, _, vt = torch.linalg.svd(delta_OK.detach().double(), full_matrices=False)
    inside = u[:, :rank].T @ weight_OK.double() @ vt[:rank].T
    return float(delta_OK.double().norm() / inside.norm())


def table(records: Records) -> str:
    """Means over the layers of each kind."""
    kinds = sorted({one["site"].rpartition(".")[2] for one in records.known.values()})
    rows = []
    for kind in kinds:
        found = [one for one in records.known.values() if one["site"].endswith(f".{kind}")]
        for pair in PAIRS:
            overlaps = [[one["overlaps"][pair][str(i)] for one in found] for i in TOP]
            rows.append([kind, pair, *(f"{statistics.fmean(values):.3f}" for values in overlaps), "", ""])
        amplified = [[one["amplified"][name] for one in found] for name in ("r8", "r64")]
        values = [f"{statistics.fmean(values):.1f}" for values in amplified]
        rows.append([kind, "amplification", *[""] * len(TOP), *values])
    last = next(reversed(records.known.values()), {})
    header = ["layer", "spans", *(f"phi({i}, {i})" for i in TOP), "r 8", "r 64"]
    return f"{markdown(header, rows)}\n\n{last.get('machine', '')}; load {last.get('load', '')}"


if __name__ == "__main__":
    main()
