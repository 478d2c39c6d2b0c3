"""Sanity checks of a job's first steps, which stop a run that cannot learn.

a first loss far above chance    the mask, the template or the base does not fit the examples
a gradient that is missing or 0  with B = 0, every B, magnitude and fully trained weight has a gradient in the first step
a tensor that does not move      the update is below the resolution of the tensor's data type

A has no gradient while B is zero, so it is checked from the second step on. Embedding rows must move only after a gradient has reached
them, since tokens that the first examples do not contain have none.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from veneer.adapters import Adapter
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.errors import TrainingError

_ABOVE_CHANCE = 1.5
_STEPS = 5
_SHOWN = 3


class SanityChecks:
    """Checks one job's first steps; done after a few of them, or with the last one of a shorter run."""

    def __init__(self, adapter: Adapter, vocabulary: int | None, steps: int = _STEPS) -> None:
        """Remember the initial tensors. ``vocabulary`` is the number of tokens, ``steps`` the number of steps of the job."""
        method = adapter.method
        factors = {name for kind in method.kinds for name in method.factor_names(kind)}
        first = dict.fromkeys(name for kind in method.kinds for name in method.trained_first(kind))
        self.adapter = adapter
        self.limit = None if vocabulary is None else _ABOVE_CHANCE * math.log(vocabulary)
        self.last = min(_STEPS, steps)
        self.done = False
        self._first = (*first, WEIGHT, BIAS, LORA_BIAS)
        self._late = factors - first.keys()
        self._lookup_factors = set(method.factor_names("embedding"))
        self._start = {key: value.detach().clone() for key, value in _tensors(adapter).items()}
        self._reached: set[str] = set()

    def needed(self, step: int) -> bool:
        """True if checks remain for a job at ``step``."""
        return step < self.last

    def before_step(self, step: int) -> None:
        """Check the gradients of the step ``step``, counted from 0, before it is taken.

        Raises TrainingError in the first step, with the tensors that no gradient reached.
        """
        if self.done:
            return
        tensors = _tensors(self.adapter)
        self._reached |= {key for key, value in tensors.items() if _name(key) == ROWS and _has_gradient(value)}
        if step:
            return
        for name in self._first:
            self._check_gradients({key: value for key, value in tensors.items() if _name(key) == name})

    def _check_gradients(self, tensors: dict[str, Tensor]) -> None:
        """A nonzero gradient must reach at least one of these tensors, and some gradient every one that is not a lookup table."""
        if tensors and not any(_has_gradient(value) for value in tensors.values()):
            what = "no gradient reached" if all(value.grad is None for value in tensors.values()) else "zero reached"
            raise TrainingError(
                f"{what} {_some(list(tensors))} as a gradient at step one, so the adapter cannot learn; check what lies between these "
                "layers and the loss",
                "still",
            )
        lookups = self._lookup_factors | {ROWS}
        missing = [key for key, value in tensors.items() if value.grad is None and _name(key) not in lookups]
        if missing:
            raise TrainingError(
                f"no gradient reached {_some(missing)}; leave these sites out (exclude_modules)", "still"
            )

    def after_step(self, step: int, loss: float, learning_rate: float, *, adaptive: bool = True) -> None:
        """Check the first loss, and after a few steps that all tensors have moved.

        Args:
            step: number of steps taken.
            loss: loss of the step.
            learning_rate: learning rate of the step.
            adaptive: the optimizer scales its steps (AdamW). With plain SGD, A moves later, since its gradient starts at zero.

        Raises:
            TrainingError: the loss is far above chance, or tensors do not move.
        """
        if self.done:
            return
        if step == 1 and self.limit is not None and loss > self.limit:
            raise TrainingError(
                f"the first loss is {loss:.2f}, far above the loss of random guessing ({self.limit / _ABOVE_CHANCE:.2f}): the base, its "
                "tokenizer or the template does not fit the examples; inspect them with veneer data show",
                "first_loss",
            )
        if step < self.last:
            return
        self.done = True
        if learning_rate == 0:
            return
        still = [key for key, value in _tensors(self.adapter).items() if torch.equal(value.detach(), self._start[key])]
        self._start.clear()
        may_stay = self._lookup_factors | (set() if adaptive and step > 1 else self._late)
        stuck = [key for key in still if _name(key) not in may_stay and (_name(key) != ROWS or key in self._reached)]
        if stuck:
            raise TrainingError(
                f"{_some(stuck)} did not move in {step} step{'s' if step > 1 else ''} at a learning rate of {learning_rate:g}: the "
                "update is below the resolution of the data type, or no gradient arrives; raise learning_rate, or leave these sites out",
                "still",
            )


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {f"{site}.{key}": value for site, key, value in adapter.named_tensors()}


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _has_gradient(value: Tensor) -> bool:
    return value.grad is not None and bool(value.grad.count_nonzero())


def _some(names: Collection[str]) -> str:
    shown = list(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
