"""Sanity checks of a job's first steps. The two that are certain stop a run that cannot learn; the other is a warning.

a gradient that is missing or 0  stops: with B = 0, every B, magnitude and fully trained weight has a gradient in the first step
a tensor that does not move      stops: the update is below the resolution of the tensor's data type
a first loss far above chance    warns: the mask, the template or the base may not fit the examples, or the base is overfitted to others

A has no gradient while B is zero, so it is checked from the second step on. Embedding rows must move only after a gradient has reached
them, since tokens that the first examples do not contain have none; so must the tensors of an expert, which has no gradient until a
token is routed to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.adapters import Adapter
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.errors import TrainingError, listed

_ABOVE_CHANCE = 1.5
_LEARNT = 1e-6
_STEPS = 5
_SHOWN = 3


class SanityChecks:
    """Checks one job's first steps; done after a few of them, or with the last one of a shorter run."""

    def __init__(self, adapter: Adapter, vocabulary: int | None, steps: int = _STEPS) -> None:
        """Remember the initial tensors. ``vocabulary`` is the number of tokens or classes, ``steps`` the number of steps of the job."""
        method = adapter.method
        kinds = set(adapter.kinds.values())
        own = {name for kind in kinds for name in method.tensor_names(kind)}
        first = dict.fromkeys(name for kind in sorted(kinds) for name in method.trained_first(kind))
        self.adapter = adapter
        self.limit = None if vocabulary is None else _ABOVE_CHANCE * math.log(vocabulary)
        self.last = min(_STEPS, steps)
        self.done = False
        self._first = (*first, WEIGHT, BIAS, LORA_BIAS)
        self._late = own - first.keys()
        self._lookup_factors = set(method.tensor_names("embedding")[:2]) if method.low_rank else set()
        self._start = {key: value.detach().clone() for key, value in _tensors(adapter).items()}
        self._reached: set[str] = set()

    def needed(self, step: int) -> bool:
        """True if checks remain for a job at ``step``."""
        return step < self.last

    def before_step(self, step: int, loss: float = math.inf) -> None:
        """Check the gradients of the step ``step``, counted from 0, before it is taken.

        A first ``loss`` of zero ends all checks: an adapter that starts from another one may know the examples.

        Raises TrainingError in the first step, with the tensors that no gradient reached.
        """
        self.done |= step == 0 and loss < _LEARNT
        if self.done:
            return
        tensors = _tensors(self.adapter)
        self._reached |= {key for key, value in tensors.items() if self._waits(key) and _has_gradient(value)}
        if step:
            return
        for name in self._first:
            self._check_gradients({key: value for key, value in tensors.items() if _name(key) == name})

    def _check_gradients(self, tensors: dict[str, Tensor]) -> None:
        """A nonzero gradient must reach at least one of these tensors, and some gradient every one that is not a lookup table."""
        if tensors and not any(_has_gradient(value) for value in tensors.values()):
            what = "no gradient reached" if all(value.grad is None for value in tensors.values()) else "zero reached"
            raise TrainingError(
                f"{what} {listed(tensors, _SHOWN)} as a gradient at step one, so the adapter cannot learn; check what lies between these "
                "layers and the loss",
                "still",
            )
        lookups = self._lookup_factors | {ROWS}
        missing = [
            key
            for key, value in tensors.items()
            if value.grad is None and _name(key) not in lookups and not self._waits(key)
        ]
        if missing:
            raise TrainingError(
                f"no gradient reached {listed(missing, _SHOWN)}; leave these sites out (exclude_modules)", "still"
            )

    def warning(self, step: int, loss: float) -> str | None:
        """A remark on the loss of step ``step``, counted from 1, if it is the first and cannot come from a base that fits the examples."""
        if step > 1 or self.limit is None or loss <= self.limit:
            return None
        chance = self.limit / _ABOVE_CHANCE
        return (
            f"warning: the first loss is {loss:.2f}, far above the loss of random guessing ({chance:.2f}): either the base, its tokenizer "
            "or the template does not fit the examples (veneer data show prints them), or the base is overfitted to other ones"
        )

    def after_step(self, step: int, learning_rate: float, *, adaptive: bool = True) -> None:
        """Check after a few steps that all tensors have moved.

        Args:
            step: number of steps taken.
            learning_rate: learning rate of the step.
            adaptive: the optimizer scales its steps (AdamW). With plain SGD, A moves later, since its gradient starts at zero.

        Raises:
            TrainingError: tensors do not move.
        """
        if self.done or step < self.last:
            return
        self.done = True
        if learning_rate == 0:
            return
        still = [key for key, value in _tensors(self.adapter).items() if torch.equal(value.detach(), self._start[key])]
        self._start.clear()
        may_stay = self._lookup_factors | (set() if adaptive and step > 1 else self._late)
        stuck = [key for key in still if _name(key) not in may_stay and (not self._waits(key) or key in self._reached)]
        if stuck:
            raise TrainingError(
                f"{listed(stuck, _SHOWN)} did not move in {step} step{'s' if step > 1 else ''} at a learning rate of {learning_rate:g}: "
                "the update is below the resolution of the data type, or no gradient arrives; raise learning_rate, or leave these "
                "sites out",
                "still",
            )

    def _waits(self, key: str) -> bool:
        """True for a tensor that some steps have no gradient for: rows of tokens, and experts."""
        return _name(key) == ROWS or self.adapter.tokens_at(key.rpartition(".")[0]) is not None


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {f"{site}.{key}": value for site, key, value in adapter.named_tensors()}


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _has_gradient(value: Tensor) -> bool:
    return value.grad is not None and bool(value.grad.count_nonzero())
