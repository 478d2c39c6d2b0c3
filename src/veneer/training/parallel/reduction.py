"""The SUM of a job's step over the processes of a run (``training/parallel/processes.py``): one exchange of one flat tensor.

[gradients, undivided | which parameters have one | loss and weight of each piece and seat, split | tokens of experts | faults]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import TrainingError
from veneer.training.loop.job import Job
from veneer.training.loop.step import JobLoss, PieceSum, fetch_losses
from veneer.training.parallel.processes import SLOTS, Processes, joined, split


@dataclass(frozen=True)
class Fault:
    """The reason why a job cannot take its step, and the exception behind it in the process where it was raised."""

    code: str
    reason: str
    error: Exception


class JobSum:
    """One job's exchange at its turn in a round."""

    def __init__(self, processes: Processes, job: Job, tokens: Sequence[int], experts: Mapping[str, Tensor]) -> None:
        """``tokens``: of each piece of the job's step. ``experts``: the adapter's counts of tokens by expert before the step."""
        self.processes = processes
        self.job = job
        self.tokens = tokens
        self.experts = dict(sorted(experts.items()))

    def exchange(self, parts: Mapping[int, JobLoss], fault: Fault | None) -> Fault | None:
        """Replace the job's gradients, losses and counts by those of all processes; ``parts`` are the pieces done here, by number.

        Returns:
            The fault of the first process that has any; then nothing else was changed.
        """
        fetch_losses([part.losses for part in parts.values()])
        numbers = self._numbers(parts, fault)
        flat = self._flat(numbers, empty=fault is not None)
        self.processes.add_(flat)
        found = flat[-len(numbers) :].tolist()
        if found[-1]:
            return self._common(fault)
        self._take_gradients(flat, found)
        found = found[len(self.job.parameters) :]
        seats = self.processes.sequence
        count = 2 * SLOTS * seats * len(self.tokens)
        sums = [joined(found[at : at + SLOTS]) for at in range(0, count, SLOTS)]
        losses, weights = (
            [sum(values[at : at + seats]) for at in range(0, len(values), seats)] for values in (sums[::2], sums[1::2])
        )
        self._take_experts(found[count:])
        sources: tuple[str, ...] = ()
        if not math.isfinite(sum(losses)):
            mine = [source for part in parts.values() for source in part.faults]
            sources = tuple(dict.fromkeys(source for each in self.processes.gather(mine) for source in each))
        self.job.replace_parts(
            [
                PieceSum(*piece, sources if not at else ())
                for at, piece in enumerate(zip(losses, weights, self.tokens, strict=True))
            ]
        )
        return None

    def _numbers(self, parts: Mapping[int, JobLoss], fault: Fault | None) -> list[float]:
        """The values that are sent besides gradients."""
        found = [float(parameter.grad is not None) for parameter in self.job.parameters]
        for piece in range(len(self.tokens)):
            part = parts.get(piece)
            for seat in range(self.processes.sequence):
                here = part is not None and seat == self.processes.seat
                for value in (part.loss, part.weight) if part is not None and here else (0.0, 0.0):
                    found += split(value)
        adapter = self.job.bank[self.job.name]
        for stack, before in self.experts.items():
            found += (adapter.expert_tokens[stack] - before).tolist()
        return [*found, float(fault is not None)]

    def _flat(self, numbers: list[float], *, empty: bool) -> Tensor:
        parameters = self.job.parameters
        dtype = parameters[0].dtype
        pieces = [
            torch.zeros_like(p).flatten() if empty or p.grad is None else p.grad.detach().to(dtype).flatten()
            for p in parameters
        ]
        return torch.cat([*pieces, torch.tensor(numbers, dtype=dtype).to(parameters[0].device)])

    def _take_gradients(self, flat: Tensor, found: Sequence[float]) -> None:
        at = 0
        for parameter, count in zip(self.job.parameters, found, strict=False):
            size = parameter.numel()
            parameter.grad = flat[at : at + size].view_as(parameter).to(parameter.dtype) if count else None
            at += size

    def _take_experts(self, found: Sequence[float]) -> None:
        at = 0
        tokens = self.job.bank[self.job.name].expert_tokens
        for stack, before in self.experts.items():
            counts = torch.tensor(found[at : at + len(before)]).long()
            tokens[stack] = before + counts
            at += len(before)

    def _common(self, fault: Fault | None) -> Fault:
        faults = self.processes.gather(None if fault is None else [fault.code, fault.reason])
        at, (code, reason) = next((rank, found) for rank, found in enumerate(faults) if found is not None)
        if fault is not None and at == self.processes.rank:
            return fault
        return Fault(code, reason, TrainingError(f"process {at}: {reason}", code))
