"""The first steps are watched: what cannot learn is stopped before it costs a week.

a first loss far above chance        the mask, the template or the base is not what it should be
no gradient where there must be one  with B = 0, every B has a gradient at step one (and every DoRA magnitude)
a tensor that does not move          an update below the resolution of its stored type is no update
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.adapters import Adapter
from veneer.errors import TrainingError

_ABOVE_CHANCE = 1.5
_STEPS = 5
_SHOWN = 3


class FirstSteps:
    """Watches one job from step 0; done after a few steps."""

    def __init__(self, adapter: Adapter, vocabulary: int | None) -> None:
        self.adapter = adapter
        self.limit = None if vocabulary is None else _ABOVE_CHANCE * math.log(vocabulary)
        self._start = {key: value.detach().clone() for key, value in _tensors(adapter).items()}
        self.done = False

    def wants(self, step: int) -> bool:
        """Whether there is something left to watch for a job that stands at ``step``."""
        return step < _STEPS

    def before_step(self) -> None:
        """Check the gradients of the first step, before it is taken.

        Raises TrainingError naming the tensors that no gradient reached.
        """
        names = ("lora_B", "lora_embedding_A", "lora_magnitude_vector")
        tensors = {key: value for key, value in _tensors(self.adapter).items() if key.rsplit(".", 1)[1] in names}
        still = [key for key, value in tensors.items() if value.grad is None]
        if still and len(still) == len(tensors):
            raise TrainingError(
                f"no gradient reached any tensor of the adapter ({_some(still)}), so it cannot learn", "still"
            )
        partly = [key for key in still if not key.endswith("lora_embedding_A")]
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
        if step < _STEPS:
            return
        self.done = True
        if learning_rate == 0:
            return
        still = [key for key, value in _tensors(self.adapter).items() if torch.equal(value.detach(), self._start[key])]
        self._start.clear()
        slow = (
            ("lora_embedding_A", "lora_embedding_B") if adaptive else ("lora_embedding_A", "lora_embedding_B", "lora_A")
        )
        stuck = [key for key in still if not key.endswith(slow)]
        if stuck:
            raise TrainingError(
                f"{_some(stuck)} did not move in {_STEPS} steps at a learning rate of {learning_rate:g}: the update is below the "
                "resolution of the stored numbers, or no gradient arrives; raise learning_rate, or leave these sites out",
                "still",
            )


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {f"{site}.{key}": value for site, key, value in adapter.named_tensors()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
