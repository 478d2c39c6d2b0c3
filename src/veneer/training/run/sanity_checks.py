"""The first steps are watched: what cannot learn is stopped before it costs a week.

a first loss far above chance    the mask, the template or the base is not what it should be
no gradient, or one of zero      with B = 0 every B has a gradient at step one, and so has every magnitude and every weight of its own
a tensor that does not move      an update below the resolution of its stored type is no update

A has no gradient while B is zero, so it is looked at from the second step on. Rows of tokens are held to move only once a gradient has
reached them: a token that the first examples do not hold has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.adapters import Adapter
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.errors import TrainingError

_ABOVE_CHANCE = 1.5
_STEPS = 5
_SHOWN = 3
_LOOKED_UP = ("lora_embedding_A", "lora_embedding_B", ROWS)
"""Tensors of which only the rows of tokens that occur have a gradient."""
_AT_ONCE = ("lora_B", "lora_embedding_A", "lora_magnitude_vector", WEIGHT, BIAS, LORA_BIAS)
"""Tensors that have a gradient at the first step."""


class FirstSteps:
    """Watches one job from step 0; done after a few steps, or with the last one of a shorter run."""

    def __init__(self, adapter: Adapter, vocabulary: int | None, steps: int = _STEPS) -> None:
        self.adapter = adapter
        self.limit = None if vocabulary is None else _ABOVE_CHANCE * math.log(vocabulary)
        self.last = min(_STEPS, steps)
        self._start = {key: value.detach().clone() for key, value in _tensors(adapter).items()}
        self._reached: set[str] = set()
        self.done = False

    def wants(self, step: int) -> bool:
        """Whether there is something left to watch for a job that stands at ``step``."""
        return step < self.last

    def before_step(self, step: int) -> None:
        """Look at the gradients of a step before it is taken; ``step`` counts from 0.

        Raises TrainingError at the first, naming the tensors that no gradient reached.
        """
        if self.done:
            return
        tensors = _tensors(self.adapter)
        self._reached |= {key for key, value in tensors.items() if _kind(key) == ROWS and _has_gradient(value)}
        if step:
            return
        for kind in _AT_ONCE:
            self._check_kind({key: value for key, value in tensors.items() if _kind(key) == kind})

    def _check_kind(self, tensors: dict[str, Tensor]) -> None:
        """Hold the tensors of one kind to what must reach them: something must reach one of them, and none may be left out."""
        if tensors and not any(_has_gradient(value) for value in tensors.values()):
            what = "no gradient reached" if all(value.grad is None for value in tensors.values()) else "zero reached"
            raise TrainingError(
                f"{what} {_some(list(tensors))} as a gradient at step one, so the adapter cannot learn: something between these "
                "layers and the loss stops it",
                "still",
            )
        partly = [key for key, value in tensors.items() if value.grad is None and _kind(key) not in _LOOKED_UP]
        if partly:
            raise TrainingError(
                f"no gradient reached {_some(partly)}; leave these sites out (exclude_modules)", "still"
            )

    def after_step(self, step: int, loss: float, learning_rate: float, *, adaptive: bool = True) -> None:
        """Check the first loss, and after a few steps that everything moved.

        adaptive: whether the optimizer scales its steps (AdamW); plain SGD moves A, whose gradient begins at zero, later.
        Raises TrainingError with what does not move, or the loss that cannot be.
        """
        if self.done:
            return
        if step == 1 and self.limit is not None and loss > self.limit:
            raise TrainingError(
                f"the first loss is {loss:.2f}, far above what guessing gives ({self.limit / _ABOVE_CHANCE:.2f}); the base, its "
                "tokenizer or the template is not what the examples need (veneer data show prints what is trained)",
                "first_loss",
            )
        if step < self.last:
            return
        self.done = True
        if learning_rate == 0:
            return
        still = [key for key, value in _tensors(self.adapter).items() if torch.equal(value.detach(), self._start[key])]
        self._start.clear()
        slow = {"lora_embedding_A", "lora_embedding_B"} | (set() if adaptive and step > 1 else {"lora_A"})
        stuck = [key for key in still if _kind(key) not in slow and (_kind(key) != ROWS or key in self._reached)]
        if stuck:
            raise TrainingError(
                f"{_some(stuck)} did not move in {step} step{'s' if step > 1 else ''} at a learning rate of {learning_rate:g}: the "
                "update is below the resolution of the stored numbers, or no gradient arrives; raise learning_rate, or leave these "
                "sites out",
                "still",
            )


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {f"{site}.{key}": value for site, key, value in adapter.named_tensors()}


def _kind(key: str) -> str:
    return key.rpartition(".")[2]


def _has_gradient(value: Tensor) -> bool:
    return value.grad is not None and bool(value.grad.count_nonzero())


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
