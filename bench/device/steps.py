"""A training step on one shape, beside PEFT and TRL: losses and gradients compared first, then speed, and memory at its peak.

Each contestant trains the same first adapter on the same rows: 8,192 tokens of lengths from 128 to 2,048, rank 16, all linear layers,
AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.device.ceilings import measured_rate
from bench.device.clock import forget_peak, peak, seconds
from bench.device.peers import adapted_by_peft, peft_flat, peft_padded, trl_seconds
from bench.device.shapes import made, ragged, useful_flops
from bench.device.supervise import Row, Setting, check, figure
from veneer.adapters import DoRA, LoRA
from veneer.checkpoints import attach
from veneer.config import TrainOptions
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.data.order import Order
from veneer.models.fast_modules import restore_forwards, use_fast_forwards
from veneer.models.flat import FlatRunner
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import Listener, Trainer

RANK = 16
_SHAPE_BOUND = 5e-2
"""Relative distance of gradients in bf16 from those of another program in bf16."""


@dataclass(frozen=True)
class Place:
    """What all contestants share."""

    setting: Setting
    model: Any
    rows: list[Example]
    flops: float

    @property
    def device(self) -> torch.device:
        """The device."""
        return torch.device(self.setting.device)

    @property
    def rounds(self) -> int:
        """Steps that are timed."""
        return 2 if self.setting.tiny else 8

    def speed(self, name: str, took: float) -> Row:
        """A contestant's row."""
        tokens, rate = sum(map(len, self.rows)), measured_rate(self.setting)
        share = None if rate is None else round(self.flops / took / rate, 4)
        return figure(name, round(tokens / took, 1), "tokens/s", share_of_product_rate=share, peak_gb=peak(self.device))


def run(setting: Setting) -> Iterator[Row]:
    """Qwen3-1.7B's shape."""
    yield from compare(place_of("qwen", setting), trl=not setting.tiny)


def place_of(shape: str, setting: Setting) -> Place:
    """The base of a shape and its rows."""
    model = made(shape, setting)
    rows = ragged(setting, model.config.vocab_size)
    return Place(setting, model, rows, useful_flops(model, rows, RANK))


def compare(place: Place, *, prefix: str = "", dora: bool = True, trl: bool = False) -> Iterator[Row]:
    """All contestants on one base. A peer that fails has a row that says why."""
    first, gradients = None, None
    for method in (LoRA, DoRA) if dora else (LoRA,):
        row, adapter, grads = ours(place, method(r=RANK, lora_alpha=2 * RANK), prefix)
        yield row
        if method is LoRA:
            first, gradients = adapter, grads
    assert first is not None and gradients is not None
    for name, peer in (("PEFT, padded rows", peft_padded), ("PEFT on our flat attention", peft_flat)):
        yield from _peer(place, f"{prefix}{name}", peer, first, gradients)
    if trl:
        forget_peak(place.device)
        try:
            took = trl_seconds(place.model, place.rows, RANK, steps=4)
            yield place.speed(f"{prefix}TRL with Liger", took)
        except Exception as error:
            yield figure(f"{prefix}TRL with Liger", f"{type(error).__name__}: {error}"[:200])


def ours(place: Place, method: LoRA | DoRA, prefix: str) -> tuple[Row, dict[str, Tensor], dict[str, Tensor]]:
    """Our step: (row, the first A of each site, gradients of B of each site)."""
    forget_peak(place.device)
    bank = attach(place.model)
    bank.add("job", method, seed=0)
    use_fast_forwards(place.model)
    stepper = Stepper(FlatRunner(place.model), bank)
    first = {site: own["lora_A"].detach().clone() for site, own in bank["job"].tensors.items()}
    losses = stepper.forward_backward(make_batch(place.rows, "job"))
    grads = {site: (own["lora_B"].grad / losses["job"].weight).cpu() for site, own in bank["job"].tensors.items()}  # type: ignore[operator]
    for parameter in bank.parameters("job"):
        parameter.grad = None
    trainer = trainer_of(stepper, [job_of(bank, "job", place.rows)], sum(map(len, place.rows)))
    took = seconds(trainer.round, place.device, rounds=place.rounds, warm=2)
    row = place.speed(f"{prefix}{method.label}", took)
    bank.detach()
    restore_forwards(place.model)
    return row, first, grads


def _peer(
    place: Place,
    name: str,
    peer: Callable[..., Callable[[], Tensor]],
    first: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> Iterator[Row]:
    forget_peak(place.device)
    try:
        with adapted_by_peft(place.model, first, RANK) as (model, factors):
            parameters = [p for p in model.parameters() if p.requires_grad]
            step = peer(model, place.rows, place.device)
            step().backward()
            pairs = [(factors[site].grad.float().cpu(), grad) for site, grad in gradients.items()]
            off = sum(float((theirs - ours).square().sum()) for theirs, ours in pairs)
            size = sum(float(ours.square().sum()) for _, ours in pairs)
            yield check(
                f"{name}: gradients apart",
                (off / size) ** 0.5,
                1e-4 if place.setting.tiny else _SHAPE_BOUND,
                "relative",
            )
            optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0, fused=True)

            def whole() -> None:
                optimizer.zero_grad()
                step().backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()

            yield place.speed(name, seconds(whole, place.device, rounds=place.rounds, warm=2))
    except Exception as error:
        yield figure(name, f"{type(error).__name__}: {error}"[:200])


def job_of(bank: Any, name: str, rows: list[Example]) -> Job:
    """A job that takes all rows in every step."""
    chosen = TrainOptions(data=("rows",), batch_size=len(rows), steps=1_000_000, learning_rate=2e-5, warmup_steps=0)
    job = Job(name, chosen, bank, rows, [], peak=2e-5, steps=1_000_000)
    job.order = Order(len(rows), shuffle=False)
    return job


def trainer_of(stepper: Stepper, jobs: list[Job], tokens: int, shared: int = 0) -> Trainer:
    """The trainer of ``veneer train``; a job that fails ends the stage."""
    return Trainer(stepper, jobs, _Strict(), tokens_per_pass=tokens, tokens_per_shared_pass=shared)


class _Strict(Listener):
    def ended(self, job: Job) -> None:
        raise SystemExit(f"{job.name}: {job.reason}")
