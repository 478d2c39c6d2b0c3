"""Veneer through the trainer of ``veneer train``: one job, one round per step."""

from __future__ import annotations

import veneer  # noqa: F401  # isort: skip  (before torch, as in a command: it limits how long OpenMP's threads spin)

from contextlib import nullcontext
from typing import Any

import torch

from bench.workers.turn import Turn
from veneer.adapters import METHODS
from veneer.checkpoints import attach
from veneer.config import TrainOptions
from veneer.data.example import Example
from veneer.data.order import Order
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base
from veneer.training.activation_checkpointing import activation_checkpointing
from veneer.training.cpp_kernels import use_cpp_kernels
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import Listener, Trainer

LEARNING_RATE = 2e-5


class Last(Listener):
    """Keeps the loss of the last step."""

    loss = float("nan")

    def stepped(self, job: Job, metrics: dict[str, float]) -> None:
        """Keep the loss."""
        self.loss = metrics["loss"]

    def ended(self, job: Job) -> None:
        """Report a job that failed."""
        raise SystemExit(f"{job.name}: {job.reason}")


def options(spec: dict[str, Any]) -> TrainOptions:
    """Options of a run equivalent to the contestant."""
    return TrainOptions(
        data=("rows",),  # rows come from memory
        method=spec["method"],
        r=spec["r"],
        lora_alpha=2 * spec["r"],
        lora_dropout=spec["dropout"],
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        batch_size=len(spec["steps"][0]),
        steps=1_000_000,
    )


def job_of(spec: dict[str, Any], bank: Any, *, steps: int = 1_000_000) -> Job:
    """The contestant's adapter and job, over the rows in order."""
    chosen = options(spec)
    fields = {name: getattr(chosen, name) for name in ("r", "lora_alpha", "lora_dropout")}
    bank.add("bench", METHODS[spec["method"]](**fields), seed=0)
    rows = [Example(tuple(row["ids"]), tuple(row["weights"]), "rows") for step in spec["steps"] for row in step]
    job = Job("bench", chosen, bank, rows, [], peak=LEARNING_RATE, steps=steps)
    job.order = Order(len(rows), shuffle=False)
    return job


def run(spec: dict[str, Any], turn: Turn) -> None:
    """Take steps until the pipe is closed."""
    base = load_base(spec["base"], dtype=spec["dtype"])
    use_cpp_kernels()  # as in a run
    turn.loaded(base.model)
    bank = attach(base.model)
    use_fast_forwards(base.model)
    job = job_of(spec, bank)
    listener = Last()
    stepper = Stepper(FlatRunner(base.model), bank)
    trainer = Trainer(stepper, [job], listener, tokens_per_pass=job.options.tokens_per_pass, tokens_per_shared_pass=0)
    with activation_checkpointing(base.model) if spec["checkpointing"] else nullcontext():
        for _ in turn:
            trainer.round()
            turn.done(listener.loss)


def save_first(spec: dict[str, Any], folder: str) -> None:
    """Write the first adapter, which the other contestants load."""
    base = load_base(spec["base"], dtype=spec["dtype"])
    bank = attach(base.model)
    job_of(spec, bank)
    with torch.no_grad():
        bank.save("bench", folder)
    bank.detach()
