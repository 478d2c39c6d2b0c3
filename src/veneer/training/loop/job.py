"""A job: one adapter being trained, with everything that is its own.

Its examples and their order, its optimizer, learning rate, schedule, clipping, decay, random stream, finite check and stop rule.
Nothing of a job is shared with another but the frozen base, so a job that fails, ends or is cancelled leaves the others as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import Bank
from veneer.config import TrainOptions
from veneer.data.batch import Order
from veneer.data.example import Example
from veneer.errors import TrainingError
from veneer.training.loop.orthogonal import Shaper
from veneer.training.loop.schedule import rate
from veneer.training.loop.step import Share

_SHOWN = 3


class State(StrEnum):
    """Where a job stands."""

    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass
class Progress:
    """The numbers of a job that its next step depends on, besides its tensors: all of them are saved."""

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    trained: float = 0.0
    best: float | None = None
    best_step: int = 0
    looks_without_gain: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    general: list[tuple[int, float]] = field(default_factory=list)


class Job:
    """One adapter in training. ``rate`` is the resolved peak learning rate, ``steps`` the resolved number of steps."""

    def __init__(
        self,
        name: str,
        options: TrainOptions,
        bank: Bank,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        *,
        peak: float,
        steps: int,
    ) -> None:
        self.name = name
        self.options = options
        self.bank = bank
        self.examples = examples
        self.held_out = held_out
        self.order = Order(len(examples), options.seed)
        self.steps = steps
        self.peak = peak
        self.progress = Progress()
        self.state = State.RUNNING
        self.reason = ""
        self.code = ""
        self.error: Exception | None = None
        """What a failed job failed of, in the process that saw it."""
        self.looks: frozenset[int] = frozenset()
        """Steps after which the job is judged on its held-out examples, besides those of ``eval_every``."""
        self.general: Sequence[Example] = ()
        """A general text that is judged beside the held-out examples."""
        self.route: dict[str, float] | None = None
        """What its rows go through, where that is more than its own adapter."""
        self.shaper: Shaper | None = None
        """What bends its steps besides its examples."""
        self.built_on: dict[str, Any] = {}
        """The adapters that it builds on, as its receipt names them."""
        self.template: str | None = None
        """A chat template that is not the base's own, which is kept beside the adapter."""
        self.parameters: list[nn.Parameter] = bank.parameters(name)
        self.optimizer = make_optimizer(bank, name, options)
        self._reset()

    @property
    def running(self) -> bool:
        """Whether the job takes part in the next round."""
        return self.state is State.RUNNING

    @property
    def over(self) -> bool:
        """Whether the job has left the run for good."""
        return self.state not in (State.RUNNING, State.PAUSED)

    def next_examples(self) -> list[Example]:
        """The examples of the next optimizer step; the cursor moves past them when the step is taken."""
        first = self.progress.cursor
        return [self.examples[self.order.at(first + i)] for i in range(self.options.batch_size)]

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        options = self.options
        return rate(
            self.progress.step, peak=self.peak, schedule=options.schedule, warmup=options.warmup_steps, steps=self.steps
        )

    def take(self, share: Share) -> None:
        """Count what the job had in a batch towards its present step."""
        self._loss += share.loss
        self._weight += share.weight
        self._tokens += share.tokens
        self._faults += share.faults

    def optim_step(self) -> dict[str, float]:
        """Divide the gradient by the job's own weights, check it, clip it and take the optimizer's step.

        Returns loss, learning rate, gradient norm and tokens of the step. Raises TrainingError, with nothing updated, where the loss
        or the gradient is not finite; the job's tensors then stand where the last step left them.
        """
        loss, weight, tokens, faults = self._loss, self._weight, self._tokens, self._faults
        self._reset()
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        try:
            if not math.isfinite(loss):
                raise self._not_finite("the loss", loss, faults)
            # A tensor that is not finite need not show in the loss: attention on a CPU makes numbers of NaN again.
            self.check_finite()
            if not grads:
                raise TrainingError(
                    f'job "{self.name}": no gradient reached the adapter, so it cannot learn; choose other target_modules',
                    "still",
                )
            torch._foreach_mul_(grads, 1 / weight)
            figures = self.shaper.gradients() if self.shaper is not None else {}
            norm = _norm(grads)
            if not math.isfinite(norm):
                raise self._not_finite("the gradient's norm", norm)
            clip = self.options.clip
            if clip is not None and norm > clip:
                torch._foreach_mul_(grads, clip / (norm + 1e-6))
            now = self.learning_rate()
            for group in self.optimizer.param_groups:
                group["lr"] = now * group["ratio"]
            self.optimizer.step()
            if self.shaper is not None:
                self.shaper.moved()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        progress = self.progress
        progress.step += 1
        progress.cursor += self.options.batch_size
        progress.tokens += tokens
        progress.trained += weight
        return {"loss": loss / weight, "lr": now, "grad_norm": norm, "tokens": tokens, **figures}

    def check_finite(self) -> None:
        """Raise TrainingError where a tensor of the adapter holds what is no finite number: such an adapter is no result."""
        # A norm that is finite settles it; one that overflows is looked into. The largest number would take eight times as long.
        norms = torch.stack(torch._foreach_norm([parameter.detach() for parameter in self.parameters]))
        if bool(torch.isfinite(norms).all()):
            return
        for site, key, parameter in self.bank[self.name].named_tensors():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise TrainingError(
                    f'job "{self.name}": {site}.{key} is not finite after step {self.progress.step}; lower learning_rate',
                    "non_finite",
                )

    def drop_gradients(self) -> None:
        """Forget what a step has gathered so far."""
        self.optimizer.zero_grad(set_to_none=True)
        self._reset()

    def _reset(self) -> None:
        self._loss = self._weight = 0.0
        self._tokens = 0
        self._faults: tuple[str, ...] = ()

    def end(self, state: State, code: str = "", reason: str = "") -> None:
        """Leave the run."""
        self.state, self.code, self.reason = state, code, reason
        self.drop_gradients()

    def _not_finite(self, what: str, value: float, sources: Sequence[str] = ()) -> TrainingError:
        if sources:
            what += f" of {', '.join(sources[:_SHOWN])}" + (
                f" and {len(sources) - _SHOWN} more" if sources[_SHOWN:] else ""
            )
        return TrainingError(
            f'job "{self.name}", step {self.progress.step + 1}: {what} is {value}, so the step is not taken; lower learning_rate '
            f"(now {self.learning_rate():g}){', or look at these examples' if sources else ''}",
            "non_finite",
        )


def make_optimizer(bank: Bank, name: str, options: TrainOptions) -> torch.optim.Optimizer:
    """The job's own optimizer over its adapter's fp32 masters; each group keeps its ratio to the learning rate (LoRA+)."""
    groups: list[dict[str, Any]] = bank.parameter_groups(name, 1.0)
    for group in groups:
        group["ratio"] = group["lr"]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, weight_decay=options.weight_decay)
    return torch.optim.AdamW(
        groups, lr=1.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay, fused=True
    )


def _norm(grads: list[Tensor]) -> float:
    """L2 norm over all tensors, summed in fp64."""
    return math.sqrt(sum(float(square) for square in torch.stack(torch._foreach_norm(grads)).double().square()))
