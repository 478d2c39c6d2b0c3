"""Checks that a training loop trains the adapter.

Loops of other libraries build their optimizer from the parameters of the model that they are given. Given the base itself, whose
parameters are frozen, such an optimizer holds nothing that can be trained: every step succeeds and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from veneer.adapters.adapter import Adapter, new_adapter
from veneer.adapters.layers.site import Survey
from veneer.adapters.overrides import fresh_overrides
from veneer.errors import AdapterError


@contextmanager
def optimizers_checked(adapters: Sequence[Adapter]) -> Iterator[None]:
    """Inside this context, the step of an optimizer that holds nothing to train is an error, if an adapter of the route is to be trained.

    Raises:
        AdapterError: from the optimizer's ``step``.
    """
    name = next((one.name for one in adapters if any(p.requires_grad for p in one.parameters())), None)
    if name is None:
        yield
        return

    def check(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if any(parameter.requires_grad or parameter.grad is not None for parameter in held):
            return
        raise AdapterError(
            f'the optimizer that takes a step inside bank.use("{name}") holds no parameter that can be trained, so nothing would be '
            f"learnt: the base is frozen, and its parameters do not include the adapter's; give transformers' Trainer "
            f'bank.module("{name}") in place of the model, or your own optimizer bank.parameters("{name}")'
        )

    handle = register_optimizer_step_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def is_untouched(adapter: Adapter, model: nn.Module, survey: Survey) -> bool:
    """True if every tensor of an adapter still has the value with which it was made, to the bit."""
    method = adapter.method
    for site, tensors in adapter.tensors.items():
        name = method.zero_at_start(adapter.kinds[site])
        if name and (tensors[name].is_meta or bool(tensors[name].any())):
            return False
    sites = [survey.sites[site] for site in adapter.tensors]
    chosen = [*adapter.tensors] or [layer for layer in adapter.overrides if survey.find(layer) is not None]
    overrides, tokens = fresh_overrides(model, survey, method, chosen)
    fresh = new_adapter(adapter.name, method, sites, seed=adapter.seed, overrides=overrides, tokens=tokens)
    made = {(site, key): value for site, key, value in fresh.named_tensors()}
    return all(
        (site, key) in made and torch.equal(value.detach().to(made[site, key].device), made[site, key].detach())
        for site, key, value in adapter.named_tensors()
    )
