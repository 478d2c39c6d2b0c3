"""``Stepper.forward_backward(batch)``, the first of the two verbs of training; the second is ``Job.optim_step``.

The loss of job j is a weighted sum over its tokens, divided once by the job's weight count N_j over its whole optimizer step:

    L_j = sum_t w_t ce_t / N_j ,   t over the job's supervised tokens

The backward pass starts from the sum of the undivided losses of all jobs in the batch. Their graphs meet only in the frozen base, so each
adapter receives the gradient of its own job. The job divides by N_j last, so neither micro-batches nor other jobs change the mathematics.

A batch is made on the CPU and sent to the base's device in one copy. The losses stay on the device until the step needs them: `read` gets
those of all its passes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.adapters import Bank, Route
from veneer.adapters.runtime.route import MixLike
from veneer.data.batch import Batch
from veneer.kernels.cross_entropy import linear_cross_entropy
from veneer.models.flat import FlatRunner, PreparedBatch


class PassLosses:
    """The loss of each supervised token of a pass, [K], on the base's device until it is read."""

    def __init__(self, batch: Batch, jobs: list[str], keep: Tensor, losses_K: Tensor) -> None:
        self.losses_K: Tensor | None = losses_K
        self._batch = batch
        self._number = torch.tensor([jobs.index(job) for job in batch.jobs])
        self._owner_K = torch.searchsorted(batch.offsets, keep, right=True) - 1
        self._weights_K = batch.weights[keep].double()
        self._weighted_K = self._weights_K
        self._tokens = self._sums(self._number, batch.offsets.diff())
        self._weight = self._sums(self._number[self._owner_K], self._weights_K)
        self._loss = self._weight

    def take(self, losses_K: Tensor) -> None:
        """Set the losses as read, on the CPU."""
        self.losses_K = None
        self._weighted_K = losses_K.double() * self._weights_K
        self._loss = self._sums(self._number[self._owner_K], self._weighted_K)

    def of(self, job: int, name: str) -> JobLoss:
        """The part of one job, by its number in the batch."""
        return JobLoss(self, job, name, float(self._weight[job]), int(self._tokens[job]))

    def loss(self, job: int) -> float:
        """A job's sum of weighted losses, in fp64."""
        read([self])
        return float(self._loss[job])

    def faults(self, name: str) -> tuple[str, ...]:
        """Sources of the job's examples whose loss is not finite."""
        read([self])
        broken = {int(s) for s in self._owner_K[~torch.isfinite(self._weighted_K)]}
        return tuple(self._batch.sources[s] for s in sorted(broken) if self._batch.jobs[s] == name)

    def _sums(self, number: Tensor, values: Tensor) -> Tensor:
        count = 1 + int(self._number.max())
        return torch.zeros(count, dtype=values.dtype).index_add_(0, number, values)


class JobLoss:
    """One job's part of a pass: the sums of its weighted losses and of its weights (in fp64), and its tokens.

    The loss and ``faults``, the sources of the examples whose loss is not finite, are read from the device when they are first asked for.
    """

    def __init__(self, losses: PassLosses, number: int, name: str, weight: float, tokens: int) -> None:
        self.losses = losses
        self.weight = weight
        self.tokens = tokens
        self._number = number
        self._name = name

    @property
    def loss(self) -> float:
        """Sum of the weighted losses."""
        return self.losses.loss(self._number)

    @property
    def faults(self) -> tuple[str, ...]:
        """Sources of the examples whose loss is not finite."""
        return self.losses.faults(self._name)


@dataclass(frozen=True)
class PieceSum:
    """The content of a `JobLoss` whose losses were read already, perhaps in another process."""

    loss: float
    weight: float
    tokens: int
    faults: tuple[str, ...] = ()


def read(passes: Sequence[PassLosses], *more: Tensor) -> list[Tensor]:
    """Read the losses of passes that are not read yet and other tensors [n] from their device, in one copy; returns the others."""
    left = [one for one in dict.fromkeys(passes) if one.losses_K is not None]
    found = [*(one.losses_K for one in left if one.losses_K is not None), *more]
    if found and not found[0].is_cpu:
        joined = torch.cat([t.to(found[0].dtype) for t in found]).cpu()
        found = list(joined.split([len(t) for t in found]))
    for one, losses_K in zip(left, found, strict=False):
        one.take(losses_K)
    return found[len(left) :]


class Stepper:
    """Runs forward and backward passes on one base with the bank's adapters."""

    def __init__(
        self,
        runner: FlatRunner,
        bank: Bank,
        routes: Mapping[str, MixLike] | None = None,
        *,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Create a stepper.

        Args:
            runner: runs batches.
            bank: holds the adapters.
            routes: the route of each job whose segments use more than the adapter of the job's name.
            turn: a context that holds the model for one pass, where others use it too.
        """
        self.runner = runner
        self.bank = bank
        self.routes = dict(routes or {})
        self.turn = turn

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
        flat, supervised = self.runner.send(batch, keep, batch.targets[keep], batch.weights[keep])
        route = self._route(batch, jobs, flat.layout.index)
        adapters = [self.bank[name] for name in route.names]
        counters = [adapter.counters for adapter in adapters]
        trained = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
        try:
            with self.turn(), self.bank.use(route, keep=self.runner.head_cells(flat, keep), training=True):
                total, losses_K = self._loss(batch.jobs, flat, keep, supervised)
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
        losses = PassLosses(batch, jobs, keep, losses_K)
        return {job: losses.of(number, job) for number, job in enumerate(jobs)}

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

    def _loss(
        self, jobs: tuple[str, ...], flat: PreparedBatch, keep: Tensor, supervised: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(sum of weight times loss, loss of each token [K]). ``supervised``: on the device, their indices, targets and weights."""
        index_K, targets_K, weights_K = supervised
        head = None if self._head_is_adapted(jobs) else self.runner.head()
        if head is not None:
            hidden_KD = self.runner.hidden(flat)[index_K]
            return linear_cross_entropy(hidden_KD, head[0], head[1], targets_K, weights_K, all_count=True)
        logits_KV = self.runner.logits(flat, keep)
        losses_K = F.cross_entropy(logits_KV.float(), targets_K, reduction="none")
        return (losses_K * weights_K).sum(), losses_K.detach()

    def _head_is_adapted(self, jobs: tuple[str, ...]) -> bool:
        names = {name for job in set(jobs) for name in Route.parse(self.routes.get(job, job)).names}
        return any(site.is_head for name in names for site in self.bank.sites_of(name))
