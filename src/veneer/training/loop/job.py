"""A job: one adapter in training, with all of its state.

A job owns its examples and their order, optimizer, learning rate schedule, clipping, weight decay, random stream, finite check and
stopping rule. Jobs share nothing but the frozen base, so a job that fails, ends or is cancelled does not affect the others.
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
from veneer.data.example import Example
from veneer.data.order import Order
from veneer.errors import TrainingError, listed
from veneer.evaluate.losses import Losses
from veneer.training.loop.orthogonal import Orthogonality
from veneer.training.loop.schedule import learning_rate_at
from veneer.training.loop.step import JobLoss, PieceSum, fetch_losses
from veneer.training.tasks import task_of

_SHOWN = 3
_LEAST_EVAL_EVERY = 5
"""Fewest steps between evaluations where the options do not say."""


class JobState(StrEnum):
    """State of a job in its run."""

    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass
class Progress:
    """The numbers, besides tensors, on which a job's next step depends. Checkpoints save all of them."""

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    trained: float = 0.0
    best: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    general: list[tuple[int, float]] = field(default_factory=list)
    figures: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Figures of the task other than the loss, at each evaluation."""


class Job:
    """One adapter in training."""

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
        """Create a job before its first step.

        Args:
            name: name of the job and of its adapter in the bank.
            options: the job's options.
            bank: holds the adapter.
            examples: training examples.
            held_out: examples for evaluation.
            peak: the resolved peak learning rate.
            steps: the resolved number of steps.
        """
        self.name = name
        self.options = options
        self.bank = bank
        self.examples = examples
        self.held_out = held_out
        self.order = Order(len(examples), options.seed)
        self.steps = steps
        self.peak = peak
        self.eval_every = options.eval_every or max(_LEAST_EVAL_EVERY, steps // 10)
        self.progress = Progress()
        self.state = JobState.RUNNING
        self.reason = ""
        self.code = ""
        self.error: Exception | None = None
        """The exception that ended a failed job, in the process where it was raised."""
        self.extra_evaluations: frozenset[int] = frozenset()
        """Steps after which the job is evaluated in addition to every ``eval_every`` steps."""
        self.general: Sequence[Example] = ()
        """A general text, evaluated with the held-out examples."""
        self.route: dict[str, float] | None = None
        """The route of its rows, if it is more than its own adapter."""
        self.task = task_of(options)
        self.reference: dict[str, float] | None = None
        """The route without its own adapter, for a task with a reference; None is the base alone."""
        self.reference_losses: Losses | None = None
        """Losses of the held-out examples on that route, which do not change."""
        self.orthogonality: Orthogonality | None = None
        """Keeps its A factors orthogonal to those of earlier adapters."""
        self.built_on: dict[str, Any] = {}
        """The parent adapters, as the receipt names them."""
        self.template: str | None = None
        """A chat template other than the base's, which is saved with the adapter."""
        self.parameters: list[nn.Parameter] = bank.parameters(name)
        self.optimizer = make_optimizer(bank, name, options)
        self._reset()

    @property
    def running(self) -> bool:
        """True if the job takes part in the next round."""
        return self.state is JobState.RUNNING

    @property
    def over(self) -> bool:
        """True if the job finished, failed or was cancelled."""
        return self.state not in (JobState.RUNNING, JobState.PAUSED)

    @property
    def loss(self) -> float:
        """Mean loss of the current step's examples so far."""
        weight = sum(part.weight for part in self._parts)
        return sum(part.loss for part in self._parts) / weight if weight else math.nan

    def next_examples(self) -> list[Example]:
        """The examples of the next optimizer step. The cursor moves when the step is taken."""
        first = self.progress.cursor
        return [self.examples[self.order.at(first + i)] for i in range(self.options.batch_size)]

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        options, step = self.options, self.progress.step
        return learning_rate_at(
            step, peak=self.peak, schedule=options.schedule, warmup=options.warmup_steps, steps=self.steps
        )

    def add(self, loss: JobLoss) -> None:
        """Add the job's part of a pass to its current step."""
        self._parts.append(loss)

    def replace_parts(self, parts: Sequence[PieceSum]) -> None:
        """Set the parts of the current step: those of all processes in place of those that were computed here."""
        self._reset()
        self._parts += parts

    def optim_step(self) -> dict[str, float]:
        """Divide the gradient by the job's weight count, check it, clip it and take the optimizer step.

        Returns:
            Loss, learning rate, gradient norm and tokens of the step.

        Raises:
            TrainingError: the loss or the gradient is not finite. Nothing was updated.
        """
        parts = self._parts
        self._reset()
        weight, tokens = sum(part.weight for part in parts), sum(part.tokens for part in parts)
        metrics: dict[str, float] = {}
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        try:
            if grads and weight:
                torch._foreach_mul_(grads, 1 / weight)
                metrics = self.orthogonality.adjust_gradients() if self.orthogonality is not None else {}
            # All that the host must know comes back from the device at once.
            norms = self._norms()
            passes = [part.losses for part in parts if isinstance(part, JobLoss)]
            norms, lengths = fetch_losses(passes, norms, _norms(grads) if grads else norms[:0])
            loss = sum(part.loss for part in parts)
            if not math.isfinite(loss):
                raise self._not_finite("the loss", loss, [source for part in parts for source in part.faults])
            # A NaN in a tensor need not show in the loss: attention on a CPU can turn it into numbers again.
            if not bool(torch.isfinite(norms).all()):
                self._check_values()
            if not grads:
                raise TrainingError(
                    f'job "{self.name}": no gradient reached the adapter; choose other target_modules', "still"
                )
            norm = math.sqrt(sum(lengths.double().square().tolist()))
            if not math.isfinite(norm):
                raise self._not_finite("the gradient norm", norm)
            clip = self.options.clip
            if clip is not None and norm > clip:
                torch._foreach_mul_(grads, clip / (norm + 1e-6))
            now = self.learning_rate()
            for group in self.optimizer.param_groups:
                group["lr"] = now * group["ratio"]
            self.optimizer.step()
            self.bank[self.name].settle()
            if self.orthogonality is not None:
                self.orthogonality.after_step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        progress = self.progress
        progress.step += 1
        progress.cursor += self.options.batch_size
        progress.tokens += tokens
        progress.trained += weight
        return {"loss": loss / weight, "lr": now, "grad_norm": norm, "tokens": tokens, **metrics}

    def check_finite(self) -> None:
        """Raise TrainingError if a tensor of the adapter has a value that is not finite."""
        if not bool(torch.isfinite(self._norms()).all()):
            self._check_values()

    def _norms(self) -> Tensor:
        """The norm of each tensor. A finite one shows that all values are; taking the maximum would be eight times slower."""
        return _norms([parameter.detach() for parameter in self.parameters])

    def _check_values(self) -> None:
        """`check_finite`, value by value: a norm can overflow."""
        for site, key, parameter in self.bank[self.name].named_tensors():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise TrainingError(
                    f'job "{self.name}": {site}.{key} is not finite after step {self.progress.step}; lower learning_rate',
                    "non_finite",
                )

    def unreached_experts(self) -> tuple[str, ...]:
        """Experts that the adapter acts on and that no token was routed to, once the job has taken a step."""
        if not self.progress.step or self.name not in self.bank:
            return ()
        adapter = self.bank[self.name]
        return tuple(dict.fromkeys(site.rpartition(".")[0] for site in adapter.tensors if adapter.tokens_at(site) == 0))

    def drop_gradients(self) -> None:
        """Discard the gradients and losses gathered for the current step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._reset()

    def _reset(self) -> None:
        self._parts: list[JobLoss | PieceSum] = []

    def end(self, state: JobState, code: str = "", reason: str = "") -> None:
        """End the job."""
        self.state, self.code, self.reason = state, code, reason
        self.drop_gradients()

    def _not_finite(self, what: str, value: float, sources: Sequence[str] = ()) -> TrainingError:
        if sources:
            what += f" of {listed(sources, _SHOWN)}"
        return TrainingError(
            f'job "{self.name}", step {self.progress.step + 1}: {what} is {value}, and the step was not taken; lower learning_rate '
            f"(now {self.learning_rate():g}){', or check these examples' if sources else ''}",
            "non_finite",
        )


def make_optimizer(bank: Bank, name: str, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer of an adapter's fp32 tensors; each group keeps its ratio to the learning rate (LoRA+)."""
    groups: list[dict[str, Any]] = bank.parameter_groups(name, 1.0)
    for group in groups:
        group["ratio"] = group["lr"]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, weight_decay=options.weight_decay)
    return torch.optim.AdamW(
        groups, lr=1.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay, fused=True
    )


def _norms(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of each tensor, [n]."""
    return torch.stack(torch._foreach_norm(tensors))
