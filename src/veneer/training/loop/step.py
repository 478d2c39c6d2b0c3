"""``Stepper.forward_backward(batch)``, the first of the two verbs of training; the second is ``Job.optim_step``.

The loss of job j is a weighted sum over its tokens, divided once by the job's weight count N_j over its whole optimizer step:

    L_j = sum_t w_t ce_t / N_j ,   t over the job's supervised tokens

The backward pass starts from the sum of the undivided losses of all jobs in the batch. Their graphs meet only in the frozen base, so each
adapter receives the gradient of its own job. The job divides by N_j last, so neither micro-batches nor other jobs change the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.adapters import Bank, Route
from veneer.adapters.runtime.route import MixLike
from veneer.data.batch import Batch
from veneer.kernels.cross_entropy import linear_cross_entropy
from veneer.models.flat import FlatRunner, PreparedBatch


@dataclass(frozen=True)
class JobLoss:
    """One job's part of a batch: the sums of its weighted losses and of its weights (in fp64), and its tokens.

    ``faults`` are the sources of the examples whose loss is not finite.
    """

    loss: float
    weight: float
    tokens: int
    faults: tuple[str, ...] = ()


class Stepper:
    """Runs forward and backward passes on one base with the bank's adapters."""

    def __init__(self, runner: FlatRunner, bank: Bank, routes: Mapping[str, MixLike] | None = None) -> None:
        """``routes`` has the route of each job whose segments use more than the adapter of the job's name."""
        self.runner = runner
        self.bank = bank
        self.routes = dict(routes or {})

    def forward_backward(self, batch: Batch, *, between: Callable[[], object] | None = None) -> dict[str, JobLoss]:
        """Add each job's undivided gradient to its adapter's tensors.

        Args:
            batch: segments of one or more jobs.
            between: called before backward, when all activations are in memory.

        Returns:
            Each job's part of the batch.

        Raises:
            Exception: whatever the route or the model raises. No gradient was added, and the dropout streams are where they were.
        """
        keep = (batch.weights != 0).nonzero().squeeze(1)
        jobs = list(dict.fromkeys(batch.jobs))
        flat = self.runner.prepare(batch)
        route = self._route(batch, jobs, flat.layout.index)
        adapters = [self.bank[name] for name in route.names]
        counters = [adapter.counters for adapter in adapters]
        trained = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
        try:
            with self.bank.use(route, keep=self.runner.head_cells(flat, keep), training=True):
                total, losses_K = self._loss(batch, flat, keep)
                if between is not None:
                    between()
                # Not backward(): if it failed halfway, the gradients of some layers would stay behind.
                grads = torch.autograd.grad(total, trained, allow_unused=True) if total.requires_grad else ()
        except BaseException:
            for adapter, before in zip(adapters, counters, strict=True):
                adapter.counters = before
            raise
        for parameter, grad in zip(trained, grads, strict=bool(grads)):
            if grad is not None:
                # torch's fused optimizers read a gradient in the parameter's memory order, whatever its strides.
                parameter.grad = grad.contiguous() if parameter.grad is None else parameter.grad.add_(grad)
        return _job_losses(batch, jobs, keep, losses_K)

    def _route(self, batch: Batch, jobs: list[str], cells: Tensor) -> Route:
        mixes: list[MixLike] = [None, *(self.routes.get(job, job) for job in jobs)]
        if len(jobs) == 1 and (bool((cells >= 0).all()) or not self._drops(jobs[0])):
            return Route.parse(mixes[1])
        number = torch.tensor([jobs.index(job) + 1 for job in batch.jobs])
        owner_T = number.repeat_interleave(batch.offsets.diff())
        # Padding takes the base's route: no adapter computes it, and no dropout is drawn for it.
        return Route.tokens(mixes, torch.where(cells >= 0, owner_T[cells.clamp_min(0)], 0))

    def _drops(self, job: str) -> bool:
        return any(self.bank[name].method.lora_dropout for name in Route.parse(self.routes.get(job, job)).names)

    def _loss(self, batch: Batch, flat: PreparedBatch, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of weight times loss, loss of each token [K])."""
        targets_K, weights_K = batch.targets[keep], batch.weights[keep]
        head = None if self._head_is_adapted(batch.jobs) else self.runner.head()
        if head is not None:
            hidden_KD = self.runner.hidden(flat)[keep]
            return linear_cross_entropy(hidden_KD, head[0], head[1], targets_K, weights_K)
        logits_KV = self.runner.logits(flat, keep)
        losses_K = F.cross_entropy(logits_KV.float(), targets_K, reduction="none")
        return (losses_K * weights_K).sum(), losses_K.detach()

    def _head_is_adapted(self, jobs: tuple[str, ...]) -> bool:
        names = {name for job in set(jobs) for name in Route.parse(self.routes.get(job, job)).names}
        return any(site.is_head for name in names for site in self.bank.sites_of(name))


def _job_losses(batch: Batch, jobs: list[str], keep: Tensor, losses_K: Tensor) -> dict[str, JobLoss]:
    owner_K = torch.searchsorted(batch.offsets, keep, right=True) - 1
    number = torch.tensor([jobs.index(job) for job in batch.jobs])
    lengths = torch.zeros(len(jobs), dtype=torch.long).index_add_(0, number, batch.offsets.diff())
    job_K = number[owner_K]
    weights_K = batch.weights[keep].double()
    weighted_K = losses_K.double().cpu() * weights_K
    loss = torch.zeros(len(jobs), dtype=torch.float64).index_add_(0, job_K, weighted_K)
    weight = torch.zeros(len(jobs), dtype=torch.float64).index_add_(0, job_K, weights_K)
    broken = {int(s) for s in owner_K[~torch.isfinite(weighted_K)]}
    faults = {job: tuple(batch.sources[s] for s in sorted(broken) if batch.jobs[s] == job) for job in jobs}
    return {job: JobLoss(float(loss[i]), float(weight[i]), int(lengths[i]), faults[job]) for i, job in enumerate(jobs)}
