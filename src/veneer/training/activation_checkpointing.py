"""Activation checkpointing: keep only the input of each layer, and run the layer again in backward.

    without     all tensors that backward needs, of every layer
    with        one tensor [T, D] per layer, and all tensors of the one layer that runs again

It costs one more forward pass (about a third of a step) and changes no bit: a layer that runs again uses the route and the dropout masks
of its first run (``adapters/runtime/tracker.py``).

The layers are those that transformers marks as ``GradientCheckpointingLayer``. They run again only in training mode, which a base never is
in, since its own dropout must stay off. So each layer is in training mode only when it is called from outside, and not inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from veneer.errors import ConfigError

_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The outermost layers that can run again; [] if the model has none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(id(child) for child in module.modules())
    return found


@contextmanager
def activation_checkpointing(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Run the model's layers again in backward inside this context.

    Raises ConfigError for a model without such layers.
    """
    layers = layers_of(model) if on else []
    if on and not layers:
        raise ConfigError(
            f"activation_checkpointing: {type(model).__name__} has no layers that can run again; leave it off, or lower tokens_per_pass"
        )
    before = [{name: layer.__dict__[name] for name in _ATTRIBUTES if name in layer.__dict__} for layer in layers]
    try:
        for layer in layers:
            layer.__dict__.update(
                gradient_checkpointing=True, _gradient_checkpointing_func=_Checkpoint(layer), training=True
            )
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in _ATTRIBUTES:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(values)


class _Checkpoint:
    """The function through which a layer calls itself, now and again in backward."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._in_eval_mode(function, *args)
        # No random state is kept: adapter dropout has its own streams, and the base draws nothing.
        return checkpoint(self._in_eval_mode, function, *args, use_reentrant=False, preserve_rng_state=False)

    def _in_eval_mode(self, function: Callable[..., Any], *args: Any) -> Any:
        self.layer.training = False
        try:
            return function(*args)
        finally:
            self.layer.training = True
