"""The model under one adapter, as a module whose parameters are the adapter's, for training loops of other libraries.

    Trainer(bank.module("sql"), arguments, train_dataset=rows).train()

Such a loop takes everything from the module that it is given: it builds the optimizer from ``parameters()``, calls ``zero_grad()``,
clips, counts, moves, saves ``state_dict()`` and loads it again. Given the base itself it would do all that to frozen weights: no
gradient would be clipped, and what it saves would lack the adapter. So it is given this module instead, which holds the adapter's
tensors, runs the base under the adapter's route, and hands on what belongs to both (``train``, ``to``, ``config``).

Boundary: the base is not a submodule here, so nothing that a library does to parameters can reach it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site
from veneer.adapters.runtime.route import RouteLike
from veneer.errors import AdapterError

_OF_THE_BASE = frozenset(
    {
        *("config", "generation_config", "device", "dtype", "main_input_name", "base_model_prefix", "loss_type"),
        *("loss_function", "accepts_loss_kwargs", "num_parameters", "can_generate", "is_gradient_checkpointing"),
        *("activation_checkpointing_enable", "activation_checkpointing_disable", "is_activation_checkpointing"),
        *("gradient_checkpointing_enable", "gradient_checkpointing_disable", "supports_gradient_checkpointing"),
        *("enable_input_require_grads", "disable_input_require_grads", "get_input_embeddings", "get_output_embeddings"),
    }
)
"""Attributes that a training loop reads and the base has. Not all of them: its ``save_pretrained`` would save no adapter."""


class ModuleBank(Protocol):
    """The part of a bank that the module uses."""

    model: nn.Module

    def __getitem__(self, name: str) -> Adapter: ...

    def sites_of(self, name: str) -> list[Site]:
        """Sites whose forward an adapter takes part in."""
        ...

    def use(self, route: RouteLike) -> Any:
        """Run the model under a route."""
        ...

    def save(self, name: str, path: str | Path) -> None:
        """Write an adapter as a folder."""
        ...


class AdapterModule(nn.Module):
    """One adapter of a bank with the base behind it. Made by `Bank.module`."""

    bank: ModuleBank
    name: str
    held: Adapter

    def __init__(self, bank: ModuleBank, name: str) -> None:
        super().__init__()
        self.__dict__["bank"] = bank
        self.__dict__["name"] = name
        self.__dict__["held"] = bank[name]
        self.adapter = nn.Module()
        for site, key, parameter in bank[name].named_tensors():
            holder = self.adapter
            for part in site.split(".") if site else ():
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_parameter(key, parameter)
        self.training = bank.model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own call under the adapter."""
        with self._routed():
            return self.bank.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own ``generate`` under the adapter."""
        model: Any = self.bank.model
        with self._routed():
            return model.generate(*args, **kwargs)

    def save_pretrained(self, path: str | Path, **others: Any) -> None:
        """Write the adapter as a folder, as `Bank.save` does; other arguments concern whole models and are ignored."""
        self.bank.save(self.name, path)

    @property
    def base_model(self) -> Callable[..., Any]:
        """The body of the base, without its output layer, under the adapter. trl's trainers call it and compute the output layer from its
        weight.

        Raises:
            AdapterError: the adapter acts on the output layer, where such a loss would not see it.
        """
        model: Any = self.bank.model
        head = model.get_output_embeddings()
        if any(site.module is head for site in self.bank.sites_of(self.name)):
            raise AdapterError(
                f'adapter "{self.name}" acts on the output layer, and the training loop computes the loss from the base weight of that '
                "layer, so the adapter would not be trained there; leave the layer out (exclude_modules, modules_to_save), or use "
                "transformers' Trainer"
            )

        def body(*args: Any, **kwargs: Any) -> Any:
            with self._routed():
                return model.base_model(*args, **kwargs)

        return body

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Remember tags for a model card, as trl's trainers ask. The card of `Bank.save` has its own, so they are not written."""
        found = self.__dict__.setdefault("model_tags", [])
        found += [tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in found]

    def train(self, mode: bool = True) -> AdapterModule:
        """Switch the base too: the mode of its layers decides about dropout."""
        super().train(mode)
        self.bank.model.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_BASE:
            return getattr(self.bank.model, name)
        return super().__getattr__(name)

    def __reduce__(self) -> tuple[Callable[..., AdapterModule], tuple[ModuleBank, str]]:
        return adapter_module, (self.bank, self.name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AdapterModule:
        """Apply moves and casts to both."""
        model: Any = self.bank.model
        model._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _routed(self) -> Any:
        if self.bank[self.name] is not self.held:
            raise AdapterError(
                f'the bank has another adapter "{self.name}" than when this module was made; make it again with bank.module'
            )
        return self.bank.use(self.name)


def adapter_module(bank: ModuleBank, name: str) -> AdapterModule:
    """The module of one adapter. Its class bears the name of the base's and has its forward's signature, since libraries read from those
    which columns and labels the model takes, and how its loss is shifted."""
    kind = type(bank.model)

    @functools.wraps(kind.forward)
    def forward(self: AdapterModule, *args: Any, **kwargs: Any) -> Any:
        return AdapterModule.forward(self, *args, **kwargs)

    made = type(kind.__name__, (AdapterModule,), {"forward": forward, "__module__": __name__})
    found: AdapterModule = made(bank, name)
    return found
