"""``Stepper.forward_backward(batch)``, the first of the two verbs of training; the second is ``Job.optim_step``.

The loss of job j is a weighted sum over its tokens, divided once by the job's weight count N_j over its whole optimizer step:

    L_j = sum_t w_t ce_t / N_j ,   t over the job's supervised tokens

The backward pass starts from the sum of the undivided losses of all jobs in the batch. Their graphs meet only in the frozen base, so each
adapter receives the gradient of its own job. The job divides by N_j last, so neither micro-batches nor other jobs change the mathematics.

A batch is made on the CPU and sent to the base's device in one copy. The losses stay on the device until the step needs them: `read` gets
those of all its passes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters import Bank, Route
from veneer.adapters.runtime.route import MixLike
from veneer.adapters.sequence import lengthen, running
from veneer.data.batch import Batch
from veneer.kernels.attention.prepended import Prepended
from veneer.kernels.cross_entropy import linear_cross_entropy, linear_token_losses
from veneer.kernels.forms import Forms, forms, use_forms
from veneer.kernels.token_losses import token_losses
from veneer.models.divided.embedding_output import EmbeddingOutput
from veneer.models.divided.sharding import Shards
from veneer.models.flat import Flat, FlatRunner, PreparedBatch
from veneer.training.tasks.base import Task, TaskLosses, TokenLosses, token_units


class PassLosses:
    """The loss of each unit of a pass (a supervised token, or what a job's task counts), [U], on the base's device until it is read."""

    def __init__(self, batch: Batch, jobs: list[str], found: TaskLosses) -> None:
        self.losses_U: Tensor | None = found.losses_U
        self._batch = batch
        self._number = torch.tensor([jobs.index(job) for job in batch.jobs])
        self._owners_U = found.owners_U
        self._weights_U = found.weights_U.double()
        self._weighted_U = self._weights_U
        self._tokens = self._sums(self._number, batch.offsets.diff())
        self._weight = self._sums(self._number[self._owners_U], self._weights_U)
        self._loss = self._weight

    def take(self, losses_U: Tensor) -> None:
        """Set the losses as read, on the CPU."""
        self.losses_U = None
        self._weighted_U = losses_U.double() * self._weights_U
        self._loss = self._sums(self._number[self._owners_U], self._weighted_U)

    def of(self, job: int, name: str) -> JobLoss:
        """The part of one job, by its number in the batch."""
        return JobLoss(self, job, name, float(self._weight[job]), int(self._tokens[job]))

    def loss(self, job: int) -> float:
        """A job's sum of weighted losses, in fp64."""
        fetch_losses([self])
        return float(self._loss[job])

    def faults(self, name: str) -> tuple[str, ...]:
        """Sources of the job's examples whose loss is not finite."""
        fetch_losses([self])
        broken = {int(s) for s in self._owners_U[~torch.isfinite(self._weighted_U)]}
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


def fetch_losses(passes: Sequence[PassLosses], *more: Tensor) -> list[Tensor]:
    """Read the losses of passes that are not read yet and other tensors [n] from their device, in one copy; returns the others."""
    left = [one for one in dict.fromkeys(passes) if one.losses_U is not None]
    found = [*(one.losses_U for one in left if one.losses_U is not None), *more]
    if found and not found[0].is_cpu:
        joined = torch.cat([t.to(found[0].dtype) for t in found]).cpu()
        found = list(joined.split([len(t) for t in found]))
    for one, losses_U in zip(left, found, strict=False):
        one.take(losses_U)
    return found[len(left) :]


class Stepper:
    """Runs forward and backward passes on one base with the bank's adapters."""

    def __init__(
        self,
        runner: FlatRunner,
        bank: Bank,
        routes: Mapping[str, MixLike] | None = None,
        *,
        tasks: Mapping[str, Task] | None = None,
        references: Mapping[str, MixLike] | None = None,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Create a stepper.

        Args:
            runner: runs batches.
            bank: holds the adapters.
            routes: the route of each job whose segments use more than the adapter of the job's name.
            tasks: the task of each job that does something else than supervised fine-tuning.
            references: for jobs whose task has a reference, its route where it is not the base alone.
            turn: a context that holds the model for one pass, where others use it too.
        """
        self.tasks = {name: task for name, task in (tasks or {}).items() if task.has_units}
        self.references = dict(references or {})
        self.runner = runner
        self.bank = bank
        self.routes = dict(routes or {})
        self.forms: Forms | None = None
        """The forms of operations in the passes of this run; None for those in use."""
        self._turn = turn
        self.shards: Shards | None = None
        """The base's weights, where several processes hold parts of them."""
        self.bottom: EmbeddingOutput | None = None
        """The lower end of every backward pass, where processes need each other in it."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the model for one pass, with the forms of this run; others that use the base have theirs in their own turns."""
        with self._turn(), use_forms(self.forms or forms()):
            yield

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
        jobs = list(dict.fromkeys(batch.jobs))
        given, routes = batch, {job: self.routes.get(job, job) for job in jobs}
        batch, prefix = self._lengthened(given, routes)
        keep = self.runner.here(batch, (batch.weights != 0).nonzero().squeeze(1))
        rows = self.runner.rows(batch, keep)
        flat, supervised = self.runner.send(batch, rows, batch.targets[keep], batch.weights[keep])
        route = self._route(batch, routes, flat.layout.index)
        adapters = [self.bank[name] for name in route.names]
        counters = [adapter.counters for adapter in adapters]
        trained = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
        try:
            with self.turn():
                references = self._references(given)
                head = self.runner.head_cells(flat, keep)
                acting = self.bank.use(route, keep=head, training=True, windows=self._windows(batch))
                with running(self.runner, prefix), acting:
                    total, found = self._loss(batch, route, flat, keep, supervised, references)
                    if between is not None:
                        between()
                    # Not backward(): if it failed halfway, the gradients of some layers would stay behind.
                    inputs = [*trained, *self._bottom()]
                    grads = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else ()
        except BaseException:
            for adapter, before in zip(adapters, counters, strict=True):
                adapter.counters = before
            raise
        for parameter, grad in zip(trained, grads, strict=False):
            if grad is not None:
                # torch's fused optimizers read a gradient in the parameter's memory order, whatever its strides.
                parameter.grad = grad.contiguous() if parameter.grad is None else parameter.grad.add_(grad)
        losses = PassLosses(given, jobs, found)
        return {job: losses.of(number, job) for number, job in enumerate(jobs)}

    def idle(self, *, backward: bool = True) -> None:
        """Run a pass of one token of the base, in place of a piece: processes that share the base must run equal numbers of passes."""
        with torch.set_grad_enabled(backward), self.turn(), self.bank.use(None, training=backward):
            hidden_TD = self.runner.hidden(Flat.of([[0]]))
            if backward:
                torch.autograd.grad(hidden_TD[:0].sum(), self._bottom())

    def close(self) -> None:
        """Leave the model as it was."""
        if self.bottom is not None:
            self.bottom.remove()

    def _bottom(self) -> list[Tensor]:
        return [] if self.bottom is None else self.bottom.take()

    def _windows(self, batch: Batch) -> dict[str, tuple[int, int, int]]:
        """By adapter, this process's part of its tokens, where several processes share the batch."""
        split = self.runner.split
        found: dict[str, tuple[int, int, int]] = {}
        if split is None:
            return found
        first, last = split.window(batch.tokens)
        used = {job: set(Route.parse(self.routes.get(job, job)).names) for job in set(batch.jobs)}
        for name in set().union(*used.values()):
            member_T = torch.tensor([name in used[job] for job in batch.jobs]).repeat_interleave(batch.offsets.diff())
            found[name] = (int(member_T[:first].sum()), int(member_T[first:last].sum()), int(member_T.sum()))
        return found

    def _lengthened(self, batch: Batch, routes: Mapping[str, MixLike]) -> tuple[Batch, Prepended | None]:
        """The batch with the virtual tokens of its routes, and what stands there."""
        mixes = {job: Route.parse(mix).mixes[0] for job, mix in routes.items()}
        return lengthen(self.bank, batch, [mixes[job] for job in batch.jobs])

    def _route(self, batch: Batch, routes: Mapping[str, MixLike], cells: Tensor) -> Route:
        """The route of a batch, from that of each of its jobs."""
        jobs = list(routes)
        mixes: list[MixLike] = [None, *routes.values()]
        if len(jobs) == 1 and (bool((cells >= 0).all()) or not self._drops(mixes[1])):
            return Route.parse(mixes[1])
        number = torch.tensor([jobs.index(job) + 1 for job in batch.jobs])
        owner_T = number.repeat_interleave(batch.offsets.diff())
        # Padding takes the base's route: no adapter computes it, and no dropout is drawn for it.
        return Route.tokens(mixes, torch.where(cells >= 0, owner_T[cells.clamp_min(0)], 0))

    def _drops(self, mix: MixLike) -> bool:
        return any(self.bank[name].method.dropout for name in Route.parse(mix).names)

    def _references(self, batch: Batch) -> dict[int, Tensor]:
        """The log-probability of each segment whose task has a reference, under the model without the job's adapter.

        The segments go through the base once more, forward only: beside the others they would hold activations and take a backward pass.
        """
        wanted = [s for s, job in enumerate(batch.jobs) if job in self.tasks and self.tasks[job].reference]
        if not wanted:
            return {}
        part = batch.select(wanted)
        routes = {job: self.references.get(job) for job in dict.fromkeys(part.jobs)}
        part, prefix = self._lengthened(part, routes)
        keep = part.weights.nonzero().squeeze(1)
        flat, (index_K, targets_K) = self.runner.send(part, keep, part.targets[keep])
        route = self._route(part, routes, flat.layout.index)
        cells = self.runner.head_cells(flat, keep)
        with torch.no_grad(), running(self.runner, prefix), self.bank.use(route, keep=cells, training=False):
            losses_K = self._token_losses(route, flat, keep, index_K, targets_K)
        owners_K = torch.searchsorted(part.offsets, keep, right=True) - 1
        logps_S, _ = TokenLosses(losses_K, part.weights[keep], owners_K, tuple(range(len(wanted)))).sums()
        return dict(zip(wanted, logps_S.unbind(), strict=True))

    def _loss(
        self,
        batch: Batch,
        route: Route,
        flat: PreparedBatch,
        keep: Tensor,
        supervised: list[Tensor],
        references: Mapping[int, Tensor],
    ) -> tuple[Tensor, TaskLosses]:
        """(sum of weight times loss, losses of the units). ``supervised``: on the device, indices of tokens, targets and weights."""
        index_K, targets_K, weights_K = supervised
        owners_K = torch.searchsorted(batch.offsets, keep, right=True) - 1
        fused = self.runner.head() is not None and not self._head_is_adapted(route)
        if fused and not any(job in self.tasks for job in batch.jobs):
            hidden_KD = self.runner.hidden(flat)[index_K]
            # All supervised tokens may be in other processes, which need the gradients of what they attend to here.
            if not len(hidden_KD):
                return hidden_KD.sum(), TaskLosses(hidden_KD.new_zeros(0), batch.weights[keep], owners_K)
            weight_VD, bias_V = self._head_after_forward()
            total, losses_K = linear_cross_entropy(hidden_KD, weight_VD, bias_V, targets_K, weights_K, all_count=True)
            return total, TaskLosses(losses_K, batch.weights[keep], owners_K)
        losses_K = self._token_losses(route, flat, keep, index_K, targets_K)
        if not any(job in self.tasks for job in batch.jobs):
            return (losses_K * weights_K).sum(), TaskLosses(losses_K.detach(), batch.weights[keep], owners_K)
        return self._by_task(batch, owners_K, losses_K, batch.weights[keep], references)

    def _by_task(
        self, batch: Batch, owners_K: Tensor, losses_K: Tensor, weights_K: Tensor, references: Mapping[int, Tensor]
    ) -> tuple[Tensor, TaskLosses]:
        """As `_loss`, with the units of each job's task."""
        found = []
        for job in dict.fromkeys(batch.jobs):
            segments = tuple(s for s, owner in enumerate(batch.jobs) if owner == job)
            own = torch.isin(owners_K, torch.tensor(segments)).nonzero().squeeze(1)
            reference_S = torch.stack([references[s] for s in segments]) if segments[0] in references else None
            tokens = TokenLosses(
                losses_K[own.to(losses_K.device)],
                weights_K[own],
                owners_K[own],
                segments,
                reference_S,
                batch.undesirable.intersection(segments),
            )
            task = self.tasks.get(job)
            found.append(token_units(tokens) if task is None else task.losses(tokens))
        losses_U = torch.cat([each.losses_U for each in found])
        weights_U = torch.cat([each.weights_U for each in found])
        total = (losses_U * weights_U.to(losses_U)).sum()
        return total, TaskLosses(losses_U.detach(), weights_U, torch.cat([each.owners_U for each in found]))

    def _token_losses(
        self, route: Route, flat: PreparedBatch, keep: Tensor, index_K: Tensor, targets_K: Tensor
    ) -> Tensor:
        """The loss of each kept token, or of the segment of it, [K], with a gradient."""
        if self.runner.head() is not None and not self._head_is_adapted(route):
            hidden_KD = self.runner.hidden(flat)[index_K]
            return linear_token_losses(hidden_KD, *self._head_after_forward(), targets_K)
        return token_losses(self.runner.logits(flat, keep), targets_K)

    def _head_after_forward(self) -> tuple[Tensor, Tensor | None]:
        """The head; before the forward, processes may hold parts of it."""
        head = self.runner.head()
        assert head is not None
        return head

    def _head_is_adapted(self, route: Route) -> bool:
        return any(site.is_head for name in route.names for site in self.bank.sites_of(name))
