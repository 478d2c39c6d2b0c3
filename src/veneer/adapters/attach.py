"""attach: make any ``nn.Module`` ready for adapters; bank_of: find the bank of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.adapters.bank import Bank, FolderFormat
from veneer.adapters.layers.dry_run import NEVER_CALLED, ROWS, dry_run, equal_rows, example_inputs, rows_of
from veneer.adapters.layers.site import Survey
from veneer.adapters.layers.survey import survey
from veneer.adapters.patches import runtime_of
from veneer.adapters.wrappers import unwrapped
from veneer.errors import AdapterError


def attach(model: nn.Module, *, example: dict[str, Any] | None = None, folders: FolderFormat | None = None) -> Bank:
    """Make any ``nn.Module`` ready for adapters. The model is used as before and is not changed until an adapter is added; from then on
    its own parameters are frozen, until the last adapter leaves or the bank is detached.

    Args:
        model: the base. Of DataParallel and DistributedDataParallel the model inside is taken.
        example: keyword arguments for one forward, for a model whose inputs cannot be guessed; best with two rows or more.
        folders: how adapter folders are read and written.

    Raises:
        AdapterError: a bank is attached already, or the model cannot be called with ``example``.
    """
    given: object = model
    if not isinstance(given, nn.Module):
        raise AdapterError(f"attach takes a torch.nn.Module, found {type(given).__name__}; {_module_for(given)}")
    model = unwrapped(model)
    if bank_of(model) is not None:
        raise AdapterError("this model has a bank attached already; use it (veneer.bank_of(model)), or detach it first")
    found = survey(model)
    called, rows_known = _try_out(model, found, example)
    return Bank(model, found, called=called, rows_known=rows_known, folders=folders)


def bank_of(model: nn.Module) -> Bank | None:
    """The bank whose adapters are on this model, or None while no adapter is on it. Raises AdapterError for what is not a module."""
    given: object = model
    if not isinstance(given, nn.Module):
        raise AdapterError(f"bank_of takes a torch.nn.Module, found {type(given).__name__}; {_module_for(given)}")
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    runtime = runtime_of(model)
    return None if runtime is None else runtime.owner


def _module_for(given: object) -> str:
    """The remedy for an argument that is not a module."""
    inner = isinstance(getattr(given, "model", None), nn.Module)
    return "give its model (base.model)" if inner else "load one first: veneer.load_base(NAME).model"


def _try_out(model: nn.Module, found: Survey, example: dict[str, Any] | None) -> tuple[bool, bool]:
    """Run the model once: (whether it is known which layers are called, whether the order of rows in their inputs is known)."""
    if example is not None:
        rows = rows_of((), example)
        try:
            inputs: Any = equal_rows(example, rows)
        except TypeError:
            inputs, rows = example, 1
        try:
            dry_run(model, found, (), inputs, rows)
        except Exception as error:
            raise AdapterError(f"the model cannot be called with example=: {type(error).__name__}: {error}") from error
    else:
        inputs = example_inputs(model)
        if inputs is None:
            return False, False
        rows = ROWS
        try:
            dry_run(model, found, (), inputs, rows)
        except Exception:
            # The guess was wrong; then the first real batch is used instead.
            return False, False
    every = [*found.every(), *found.stacks.values(), *found.mixtures.values()]
    for site in every:
        if not site.layout:
            site.reason = NEVER_CALLED
    if rows > 1:
        return True, True
    for site in every:
        site.layout = ""
    return True, False
