"""Wrappers around a model or its modules: torch.compile, DataParallel, FSDP, activation checkpointing.

A wrapper adds a part to the names of the modules inside it. Names of sites, which adapter files hold, are those of the model itself.
"""

from __future__ import annotations

from torch import nn

from veneer.errors import AdapterError

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "an activation checkpointing wrapper",
}
"""Part of a module's path -> the wrapper that adds it."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel or DistributedDataParallel; the wrapper goes on calling it.

    Raises:
        AdapterError: modules inside the model are wrapped, which would change the names of its layers, or it is compiled.
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise AdapterError(
            "the model was compiled by torch.compile, which cannot trace adapters; attach to the model inside it (model._orig_mod)"
        )
    for path, _ in model.named_modules():
        wrapper = WRAPPERS.get(path.rpartition(".")[2])
        if wrapper is not None:
            raise AdapterError(
                f"{path.rpartition('.')[0] or 'the model'} is wrapped by {wrapper}, whose name would get into adapter files; attach "
                "before wrapping the modules of the model"
            )
    return model
