"""Compare eight jobs on one base with eight runs of one job: gradients, losses of every step, final adapters.

    python -m bench.beside_solo [--tiny] [--optimizer adamw sgd] [--json FILE]

LoRA and DoRA, ranks 4 to 32, different learning rates and numbers of steps, two with dropout, in fp32, on the embedded model and
pieces of Python's documentation, or on a tiny model and random tokens. At every step of the shared run each job's gradient is compared
with the one that it gets alone from the same state (bound 1e-5, relative, L2 over the adapter). With SGD the final adapters must be
within 1e-5 of the solo runs'; AdamW divides by gradients that may be tiny, so there the losses of all steps are
compared (bound 1e-4). Exits 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.tiny import tiny

from bench.mixed import BASE
from veneer.adapters import DoRA, LoRA
from veneer.checkpoints import attach
from veneer.config import TrainOptions
from veneer.data.batch import make_batch, packed
from veneer.data.example import Example
from veneer.evaluate.general import general_text
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base
from veneer.training.cpp_kernels import use_cpp_kernels
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import Listener, Trainer

EIGHT: dict[str, dict[str, Any]] = {
    "lora4": {"method": LoRA(r=4), "learning_rate": 1e-3, "steps": 8},
    "dora4": {"method": DoRA(r=4), "learning_rate": 5e-4, "steps": 5},
    "lora8-drop": {"method": LoRA(r=8, lora_dropout=0.2), "learning_rate": 2e-3, "steps": 8, "batch_size": 2},
    "dora8-drop": {"method": DoRA(r=8, lora_dropout=0.1), "learning_rate": 1e-3, "steps": 10},
    "rslora16": {"method": LoRA(r=16, use_rslora=True), "learning_rate": 3e-4, "steps": 7},
    "dora16": {"method": DoRA(r=16), "learning_rate": 2e-4, "steps": 8, "clip": None},
    "lora32": {"method": LoRA(r=32), "learning_rate": 1e-4, "steps": 6, "weight_decay": 0.1},
    "dora32": {"method": DoRA(r=32), "learning_rate": 4e-4, "steps": 9, "schedule": "cosine"},
}


BOUNDS = {"gradient": 1e-5, "loss": 1e-4, "adapter": 1e-5}


class Losses(Listener):
    """Records the loss of each step, and the difference of each gradient from the one that the job gets alone."""

    def __init__(self, check: bool) -> None:
        self.check = check
        self.of: dict[str, list[float]] = {}
        self.gradients: dict[str, list[float]] = {}
        self.trainer: Trainer | None = None

    def stepping(self, job: Job) -> None:
        """Run the job's examples again, alone and with the same dropout, and compare the gradients."""
        if not self.check or self.trainer is None:
            return
        mixed = [p.grad.clone() for p in job.parameters if p.grad is not None]
        job.optimizer.zero_grad()
        pieces = [*packed(job.next_examples(), self.trainer.tokens_per_pass)]
        if job.bank[job.name].method.lora_dropout:
            job.bank[job.name].draws -= len(pieces)
        for piece in pieces:
            self.trainer.stepper.forward_backward(make_batch(piece, [job.name] * len(piece)))
        solo = [p.grad for p in job.parameters if p.grad is not None]
        self.gradients.setdefault(job.name, []).append(_apart(_flat(mixed), _flat(solo)))
        for parameter, grad in zip(job.parameters, mixed, strict=True):
            parameter.grad = grad

    def stepped(self, job: Job, metrics: dict[str, float]) -> None:
        """Record the loss."""
        self.of.setdefault(job.name, []).append(metrics["loss"])


def _flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def examples(name: str, vocabulary: int, text: Sequence[int] = ()) -> list[Example]:
    """Four rows of 12 to 40 tokens, the second half trained: pieces of ``text``, or random tokens without one."""
    draw = torch.Generator().manual_seed(len(name) * 1000 + ord(name[0]) + int("".join(c for c in name if c.isdigit())))

    def some(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=draw)

    found = []
    for i in range(4):
        count = int(some(12, 41))
        at = int(some(0, max(1, len(text) - count)))
        row = text[at : at + count] if text else some(3, vocabulary, count).tolist()
        found.append(Example(tuple(row), (0.0,) * (count // 2) + (1.0,) * (count - count // 2), f"{name}:{i}"))
    return found


def trained(
    model: Any, text: Sequence[int], names: Sequence[str], optimizer: str
) -> tuple[Losses, dict[str, torch.Tensor]]:
    """Train some of the eight jobs on one base. Returns the recorded losses and each adapter as one vector."""
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
        rows = examples(name, model.config.vocab_size, text)
        jobs.append(Job(name, options, bank, rows, [], peak=peak, steps=options.steps or 1))
    recorder = Losses(check=len(names) > 1)
    recorder.trainer = Trainer(
        Stepper(FlatRunner(model), bank), jobs, recorder, tokens_per_pass=1024, tokens_per_shared_pass=512
    )
    recorder.trainer.run()
    ends = {name: _flat(bank.parameters(name)) for name in names}
    bank.detach()
    return recorder, ends


def compared(model: Any, text: Sequence[int], optimizer: str) -> dict[str, dict[str, Any]]:
    """Train both ways, print the curves of each job and return the differences."""
    together, ends = trained(model, text, [*EIGHT], optimizer)
    found: dict[str, dict[str, Any]] = {}
    for name in EIGHT:
        alone, end = trained(model, text, [name], optimizer)
        pairs = list(zip(together.of[name], alone.of[name], strict=True))
        gradients = together.gradients[name]
        found[name] = {
            "losses": pairs,
            "loss": max(abs(a - b) for a, b in pairs),
            "gradient": max(gradients),
            "adapter": _apart(ends[name], end[name]),
        }
        print(f"\n{name}, {optimizer}\n  step   loss together   loss alone   difference   gradient diff.")
        for step, ((a, b), gradient) in enumerate(zip(pairs, gradients, strict=True), 1):
            print(f"  {step:4}   {a:13.6f}   {b:10.6f}   {a - b:+10.1e}   {gradient:14.1e}")
        print(f"  final adapters differ by {found[name]['adapter']:.1e}", flush=True)
    return found


def main() -> int:
    """Print the curves and the differences. Returns 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead of the embedded one")
    parser.add_argument("--optimizer", nargs="+", choices=("adamw", "sgd"), default=["adamw", "sgd"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = None if args.tiny else load_base(BASE, dtype="float32")
    use_cpp_kernels()  # as in a run
    model: Any = tiny("llama") if base is None else base.model
    text: list[int] = [] if base is None else base.tokenizer(general_text()[:200_000], verbose=False)["input_ids"]
    found = {optimizer: compared(model, text, optimizer) for optimizer in args.optimizer}
    broken = 0
    print(f"\n{len(EIGHT)} jobs, {torch.get_num_threads()} threads; largest differences and bounds:")
    for optimizer, jobs in found.items():
        for key, bound in BOUNDS.items():
            largest = max(one[key] for one in jobs.values())
            held = key != ("loss" if optimizer == "sgd" else "adapter")
            broken += held and not largest <= bound
            print(f"  {optimizer:5} {key:8} {largest:.1e}" + (f" (bound {bound:.0e})" if held else ""))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
