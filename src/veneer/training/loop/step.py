"""The two verbs of training: ``forward_backward(batch)`` here, and each job's own ``optim_step``.

The loss of job j is a weighted sum over its tokens, divided once by the job's own weight count N_j over its whole optimizer step:

    L_j = sum_t w_t ce_t / N_j ,   t over the job's supervised tokens

What goes backward is the sum of the undivided losses of all jobs in the batch. Their graphs meet only in the frozen base, so each
adapter receives the gradient of its own job alone, and since division by N_j comes last (in the job), neither micro-batches nor
neighbours change the mathematics.
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
from veneer.models.flat import FlatRunner


@dataclass(frozen=True)
class Share:
    """What one job had in a batch: its summed weighted loss and its summed weights, in fp64.

    faults: where the examples come from whose loss is not finite.
    """

    loss: float
    weight: float
    tokens: int
    faults: tuple[str, ...] = ()


class Stepper:
    """Runs batches forward and backward on one base, with the bank's adapters."""

    def __init__(self, runner: FlatRunner, bank: Bank, routes: Mapping[str, MixLike] | None = None) -> None:
        """routes: what a job's segments go through, where that is more than the adapter of the job's name."""
        self.runner = runner
        self.bank = bank
        self.routes = dict(routes or {})

    def forward_backward(self, batch: Batch, *, between: Callable[[], object] | None = None) -> dict[str, Share]:
        """Add each job's undivided gradient to its adapter's tensors; returns what each job had in the batch.

        between: called when all activations are held, before backward.
        Raises whatever the route or the model raises; then no gradient was added and no dropout drawn, as if it had not been called.
        """
        keep = (batch.weights != 0).nonzero().squeeze(1)
        jobs = list(dict.fromkeys(batch.jobs))
        layout = self.runner.layout(batch)
        route = self._route(batch, jobs, layout.index)
        adapters = [self.bank[name] for name in route.names]
        draws = [adapter.draws for adapter in adapters]
        trained = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
        try:
            with self.bank.use(route, keep=self.runner.head_cells(batch, keep), training=True):
                total, losses_K = self._loss(batch, keep)
                if between is not None:
                    between()
                # Not backward(): what fails half way would leave the gradients of some layers behind.
                grads = torch.autograd.grad(total, trained, allow_unused=True) if total.requires_grad else ()
        except BaseException:
            for adapter, number in zip(adapters, draws, strict=True):
                adapter.draws = number
            raise
        for parameter, grad in zip(trained, grads, strict=bool(grads)):
            if grad is not None:
                # torch's fused optimizers read a gradient's memory in the parameter's order, whatever its strides say.
                parameter.grad = grad.contiguous() if parameter.grad is None else parameter.grad.add_(grad)
        return _shares(batch, jobs, keep, losses_K)

    def _route(self, batch: Batch, jobs: list[str], cells: Tensor) -> Route:
        mixes: list[MixLike] = [None, *(self.routes.get(job, job) for job in jobs)]
        if len(jobs) == 1 and (bool((cells >= 0).all()) or not self._drops(jobs[0])):
            return Route.parse(mixes[1])
        number = torch.tensor([jobs.index(job) + 1 for job in batch.jobs])
        owner_T = number.repeat_interleave(batch.offsets.diff())
        # Padding takes the base's route: no adapter works on it, and no dropout is drawn for it, whatever stands beside.
        return Route.tokens(mixes, torch.where(cells >= 0, owner_T[cells.clamp_min(0)], 0))

    def _drops(self, job: str) -> bool:
        return any(self.bank[name].method.lora_dropout for name in Route.parse(self.routes.get(job, job)).names)

    def _loss(self, batch: Batch, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of weight times loss, the tokens' own losses [K])."""
        targets_K, weights_K = batch.targets[keep], batch.weights[keep]
        head = None if self._head_is_adapted(batch.jobs) else self.runner.head()
        if head is not None:
            hidden_KD = self.runner.hidden(batch)[keep]
            return linear_cross_entropy(hidden_KD, head[0], head[1], targets_K, weights_K)
        logits_KV = self.runner.logits(batch, keep)
        losses_K = F.cross_entropy(logits_KV.float(), targets_K, reduction="none")
        return (losses_K * weights_K).sum(), losses_K.detach()

    def _head_is_adapted(self, jobs: tuple[str, ...]) -> bool:
        names = {name for job in set(jobs) for name in Route.parse(self.routes.get(job, job)).names}
        return any(_adapts_head(self.bank, name) for name in names)


def _adapts_head(bank: Bank, name: str) -> bool:
    return any(site.is_head for site in bank.sites_of(name))


def _shares(batch: Batch, jobs: list[str], keep: Tensor, losses_K: Tensor) -> dict[str, Share]:
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
    return {job: Share(float(loss[i]), float(weight[i]), int(lengths[i]), faults[job]) for i, job in enumerate(jobs)}
