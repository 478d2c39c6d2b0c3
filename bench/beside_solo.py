"""Eight jobs on one base beside eight runs of their own: the losses of every step, side by side, and how far adapters end apart.

    python -m bench.beside_solo [--tiny] [--optimizer adamw|sgd] [--json FILE]

LoRA and DoRA, ranks 4 to 32, own learning rates, two with dropout, different lengths of run, in fp32, on the embedded model or on a tiny
one. With SGD the final adapters are held against each other; AdamW divides by gradients that may be tiny, so there the losses are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.mixed import BASE, Still
from veneer.adapters import DoRA, LoRA
from veneer.checkpoints import attach
from veneer.config import TrainOptions
from veneer.data.example import Example
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base
from veneer.models.tiny import tiny
from veneer.train.job import Job
from veneer.train.step import Stepper
from veneer.train.trainer import Trainer

EIGHT: dict[str, dict[str, Any]] = {
    "lora4": {"method": LoRA(r=4), "learning_rate": 1e-3, "steps": 8},
    "dora4": {"method": DoRA(r=4), "learning_rate": 5e-4, "steps": 5},
    "lora8 drop": {"method": LoRA(r=8, lora_dropout=0.2), "learning_rate": 2e-3, "steps": 8, "batch_size": 2},
    "dora8 drop": {"method": DoRA(r=8, lora_dropout=0.1), "learning_rate": 1e-3, "steps": 10},
    "rslora16": {"method": LoRA(r=16, use_rslora=True), "learning_rate": 3e-4, "steps": 7},
    "dora16": {"method": DoRA(r=16), "learning_rate": 2e-4, "steps": 8, "clip": None},
    "lora32": {"method": LoRA(r=32), "learning_rate": 1e-4, "steps": 6, "weight_decay": 0.1},
    "dora32": {"method": DoRA(r=32), "learning_rate": 4e-4, "steps": 9, "schedule": "cosine"},
}


class Losses(Still):
    """Remembers the loss of each step."""

    def __init__(self) -> None:
        self.of: dict[str, list[float]] = {}

    def stepped(self, job: Job, figures: dict[str, float]) -> None:
        """Remember it."""
        self.of.setdefault(job.name, []).append(figures["loss"])


def examples(name: str, vocabulary: int) -> list[Example]:
    """Random rows of 12 to 40 tokens, whose second half is learnt; few of them, so that there is something to learn."""
    draw = torch.Generator().manual_seed(len(name) * 1000 + ord(name[0]) + int("".join(c for c in name if c.isdigit())))
    found = []
    for i in range(4):
        count = int(torch.randint(12, 41, (), generator=draw))
        row = torch.randint(3, vocabulary, (count,), generator=draw).tolist()
        found.append(Example(tuple(row), (0.0,) * (count // 2) + (1.0,) * (count - count // 2), f"{name}:{i}"))
    return found


def trained(model: Any, names: Sequence[str], optimizer: str) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """The losses of some of the eight on one base, and their adapters as one vector each."""
    bank = attach(model)
    jobs, rates = [], {"adamw": 1.0, "sgd": 100.0}
    for number, name in enumerate(EIGHT):
        if name not in names:
            continue
        own = dict(EIGHT[name])
        bank.add(name, own.pop("method"), seed=number)
        peak = own.pop("learning_rate") * rates[optimizer]
        options = TrainOptions(
            data=("rows",),
            learning_rate=peak,
            optimizer=optimizer,
            warmup_steps=2,
            seed=number,
            **{"batch_size": 1, **own},
        )
        rows = examples(name, model.config.vocab_size)
        jobs.append(Job(name, options, bank, rows, [], peak=peak, steps=options.steps or 1))
    ear = Losses()
    Trainer(Stepper(FlatRunner(model), bank), jobs, ear, budget=1024, share=512).run()
    ends = {name: torch.cat([p.detach().flatten() for p in bank.parameters(name)]) for name in names}
    bank.detach()
    return ear.of, ends


def main() -> None:
    """Train both ways, print the curves and the distances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead of the embedded one")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model: Any = tiny("llama") if args.tiny else load_base(BASE, dtype="float32").model
    together, ends = trained(model, [*EIGHT], args.optimizer)
    found: dict[str, Any] = {}
    for name in EIGHT:
        alone, end = trained(model, [name], args.optimizer)
        pairs = list(zip(together[name], alone[name], strict=True))
        apart = float((ends[name] - end[name]).norm() / end[name].norm())
        found[name] = {"losses": pairs, "largest": max(abs(a - b) for a, b in pairs), "adapters": apart}
        print(f"\n{name}: losses together and alone")
        for step, (a, b) in enumerate(pairs, 1):
            print(f"  {step:3}  {a:.6f}  {b:.6f}  {a - b:+.1e}")
        print(
            f"  largest difference {found[name]['largest']:.1e}; adapters end {apart:.1e} apart (relative L2)",
            flush=True,
        )
    print(f"\nlargest difference of a loss {max(one['largest'] for one in found.values()):.1e}")
    print(f"largest distance of final adapters {max(one['adapters'] for one in found.values()):.1e}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
