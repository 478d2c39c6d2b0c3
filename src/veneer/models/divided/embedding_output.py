"""The output of the input embeddings as the lower end of every backward pass.

Processes that need each other in backward must go through the same layers there. A backward pass would otherwise end at the lowest layer
that has an adapter of this process's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingOutput:
    """Takes part in autograd from now on, and is remembered until it is taken."""

    def __init__(self, model: Any) -> None:
        self._found: Tensor | None = None
        self._hook = model.get_input_embeddings().register_forward_hook(self._made)

    def _made(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._found = output if output.requires_grad else output.requires_grad_()

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()

    def take(self) -> list[Tensor]:
        """The output in the last pass."""
        found, self._found = self._found, None
        return [] if found is None else [found]
