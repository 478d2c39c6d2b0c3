"""PEFT folders in and out: the folder format that banks are attached with.

bank = attach(model)                          # veneer.attach
bank.load("runs/style/adapter", name="style", force=("base",))
bank.save("style", "out/", base_name="org/model")
adapter = read_adapter("out/")                # without a model
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach as attach_bank
from veneer.adapters.bank import Bank
from veneer.adapters.methods import Method
from veneer.checkpoints.base_view import BaseView, base_view
from veneer.checkpoints.locate import adapters_at, find_adapter, looks_like_hub_id, named_inside, why_not
from veneer.checkpoints.logit_check import logits_record
from veneer.checkpoints.peft.portable import not_portable
from veneer.checkpoints.peft.read import read_adapter_folder
from veneer.checkpoints.peft.write import write_adapter_folder
from veneer.errors import CheckpointError


@dataclass(frozen=True)
class PeftFolders:
    """Reads and writes a bank's adapters as PEFT folders. Holds no state."""

    def find(self, path: Path) -> tuple[str, Path]:
        """(default name, folder) of the adapter that a path means; a path without one is left to `read` to explain.

        Raises CheckpointError where the path holds several adapters, or folders that do, or is a hub id without one.
        """
        if adapters_at(path):
            return find_adapter(path)
        if looks_like_hub_id(path) or (named_inside(path) and not (path / "config.json").exists()):
            raise CheckpointError(why_not(path))
        return path.name or "adapter", path

    def read(self, path: Path, name: str, bank: Bank, **options: Any) -> Adapter:
        """Read the adapter in a folder for the bank's base. Options: ``force`` and ``convert``, see `read_adapter_folder`.

        Raises CheckpointError with everything that is wrong with the folder.
        """
        _check_options("load", options, ("force", "convert"))
        return read_adapter_folder(path, name, base_view(bank), **options)

    def write(self, adapter: Adapter, path: Path, bank: Bank, **options: Any) -> None:
        """Write an adapter as a folder.

        Options: those of `write_adapter_folder`, and ``logits``: run the model once and record eight numbers of the adapter's logits in
        the receipt, for ``veneer inspect --verify``.

        Raises CheckpointError when it cannot be written or does not read back equal.
        """
        _check_options("save", options, ("base_name", "task_type", "receipt", "logits", "template", "experts"))
        receipt = dict(options.pop("receipt", None) or {})
        if options.pop("logits", False):
            receipt["logits"] = logits_record(bank, adapter.name)
        write_adapter_folder(adapter, path, base_view(bank), receipt=receipt, **options)

    def not_portable(self, method: Method, bank: Bank) -> dict[str, str]:
        """{site: reason} for the sites whose change by this method PEFT cannot read from a folder."""
        return not_portable(bank.model, bank.sites, method)


def attach(model: nn.Module, example: dict[str, Any] | None = None) -> Bank:
    """Make any ``nn.Module`` ready for adapters, in memory and in PEFT folders. Use the model as before.

    Args:
        model: the base. It is not changed.
        example: keyword arguments for one forward, needed if the inputs of the model cannot be guessed.

    Raises:
        AdapterError: a bank is attached already.
    """
    return attach_bank(model, example=example, folders=PeftFolders())


def read_adapter(path: str | Path, name: str | None = None, *, force: str | Iterable[str] = ()) -> Adapter:
    """Read the adapter at a path without a model. The folder is checked by itself, not against a base.

    Args:
        path: a PEFT folder, its .safetensors file, or a run.
        name: the adapter's name, "adapter" by default.
        force: checks to override.

    Raises:
        CheckpointError: everything that is wrong with the folder.
    """
    return read_adapter_folder(PeftFolders().find(Path(path))[1], name or "adapter", BaseView(), force=force)


def write_adapter(adapter: Adapter, path: str | Path, *, bank: Bank | None = None, **options: Any) -> None:
    """Write an adapter as a PEFT folder. Without a bank, layers are named in full and the receipt does not identify the base.

    Args:
        adapter: the adapter.
        path: the folder.
        bank: the bank whose base the adapter acts on.
        options: those of `write_adapter_folder`: ``base_name``, ``task_type``, ``receipt``, ``template`` and ``experts``.

    Raises:
        CheckpointError: the folder cannot be written, or does not read back equal.
    """
    write_adapter_folder(adapter, Path(path), base_view(bank), **options)


def _check_options(verb: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [name for name in options if name not in known]
    if unknown:
        raise CheckpointError(f"{verb} has no option {unknown[0]}; it has {', '.join(known)}")
