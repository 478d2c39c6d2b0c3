"""Activation checkpointing: keep only what enters each layer, and run the layer again in backward.

    kept without it     everything that backward needs, of every layer
    kept with it        one tensor [T, D] a layer, and everything of the one layer that is being run again

It costs one more forward pass (about a third of a step) and changes no bit: a layer that runs again takes the route and the dropout
masks of its first run (``adapters/runtime/recompute.py``).

The layers are the model's own: transformers marks those that can be run again as ``GradientCheckpointingLayer``, which do so when they
are in training mode. A base is never in training mode here, since its own dropout must stay off, so the mode is shown to that one
question only: each layer says yes from outside and no to everything inside it.
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
    """The layers that can be run again, the outermost ones; none where a model has no such layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(id(child) for child in module.modules())
    return found


@contextmanager
def recomputed(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Run the model's layers again in backward, inside this context; afterwards the model is as it was.

    Raises ConfigError for a model without layers that can be.
    """
    layers = layers_of(model) if on else []
    if on and not layers:
        raise ConfigError(
            f"activation_checkpointing: {type(model).__name__} has no layers that can be run again; leave it off, or lower tokens_per_pass"
        )
    before = [{name: layer.__dict__[name] for name in _ATTRIBUTES if name in layer.__dict__} for layer in layers]
    try:
        for layer in layers:
            layer.__dict__.update(
                gradient_checkpointing=True, _gradient_checkpointing_func=_Again(layer), training=True
            )
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in _ATTRIBUTES:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(values)


class _Again:
    """What a layer calls to be run now and again in backward."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._quiet(function, *args)
        # No random state is kept: dropout of adapters has its own streams, and the base draws nothing.
        return checkpoint(self._quiet, function, *args, use_reentrant=False, preserve_rng_state=False)

    def _quiet(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run the layer while it says that it is not in training."""
        self.layer.training = False
        try:
            return function(*args)
        finally:
            self.layer.training = True
