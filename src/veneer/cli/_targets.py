"""Loads the adapters and the base that a command line names.

runs/a                a run: its adapter (runs/a/adapter, or one per job in runs/a/adapters)
runs/a/best           an adapter folder
someone/sql-lora      an adapter on the hub
smollm2-135m          a base: an alias, a folder, a GGUF file or a hub id
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._terminal import note, status
from veneer.checkpoints.locate import (
    CONFIG,
    adapters_at,
    choice_note,
    head_refusal,
    is_run,
    looks_like_hub_id,
    named_inside,
    of_another_program,
    receipt_at,
    task_of_adapter,
    trained_format,
    why_not,
)
from veneer.cli._parser import add_device, add_dtype, add_force, add_quantize
from veneer.errors import BaseModelError, CheckpointError, ConfigError
from veneer.models.embedded import EMBEDDED

if TYPE_CHECKING:
    import argparse

    import torch

    from veneer.adapters import Bank
    from veneer.models.load import Base


@dataclass
class LoadedTargets:
    """A base in memory with the adapters on it; ``names`` keeps their order and is empty for a base alone. ``task``: the adapters' task."""

    base: Base
    bank: Bank
    names: list[str]
    task: str = "sft"


def add_target_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Declare the arguments that select the base and the adapters."""
    parser.add_argument(
        "target",
        nargs="+" if several else 1,
        metavar="TARGET",
        help="a run, an adapter folder or a base; NAME=FOLDER renames the adapter",
    )
    parser.add_argument("--base", metavar="MODEL", help="base model (default: the one named in the adapter folder)")
    add_force(parser)
    add_dtype(parser)
    add_device(parser)
    add_quantize(parser)


def adapter_folders(target: str) -> dict[str, Path]:
    """Return the adapter folders of a target by name; empty if the target is a base.

    Raises:
        CheckpointError: The folder contains neither a base nor an adapter.
    """
    name, _, typed = target.rpartition("=")
    path = Path(typed)
    found = adapters_at(path)
    for remark in filter(None, (choice_note(path, folder) for folder in found.values())):
        note(remark)
    if found:
        return {name: next(iter(found.values()))} if name and len(found) == 1 else found
    if not path.is_dir():
        if name or (path.is_file() and path.suffix != ".gguf"):
            raise not_an_adapter(typed)
        return {}
    if is_run(path):
        raise CheckpointError(f"{path} is a run without an adapter so far; run its training command again to resume it")
    if other := of_another_program(path):
        raise CheckpointError(other)
    if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        hint = f"; {inside}" if (inside := named_inside(path)) else ""
        raise CheckpointError(f"{path} contains neither a base (config.json) nor an adapter ({CONFIG}){hint}")
    return {}


def not_an_adapter(target: str) -> CheckpointError:
    """Return the error for a target that is not an adapter, with the remedy for the likely mistake."""
    return CheckpointError(why_not(Path(target), target))


def load_targets(args: argparse.Namespace, *, purpose: str = "generate") -> LoadedTargets:
    """Load the base once, and every adapter of the targets, frozen and on the fast path.

    Args:
        args: the arguments of ``add_target_arguments``.
        purpose: "generate" or "train", for the data type that is fastest; adapters with a head do not generate.

    Raises:
        ConfigError: The targets name different bases, two adapters have the same name, or there is no such device.
    """
    from veneer.models.devices import resolve_device

    base: str | None = args.base
    device = resolve_device(args.device)
    folders: dict[str, Path] = {}
    bases: dict[str, str] = {} if base is None else {base: "--base"}
    for target in args.target:
        found = adapter_folders(target)
        if not found:
            if base not in (None, target):
                raise not_an_adapter(target)
            if target.startswith("runs/") and not Path(target).exists():
                raise CheckpointError(f"there is no run {target}; veneer runs lists the runs that there are")
            bases.setdefault(target, "the command line")
        for name, folder in found.items():
            if name in folders:
                raise ConfigError(
                    f'two adapters are named "{name}": {folders[name]} and {folder}; rename one with NAME={folder}'
                )
            folders[name] = folder
            if base is None:
                bases.setdefault(base_named_in(folder), str(folder))
    if len(bases) > 1:
        sources = "; ".join(f"{model} (from {source})" for model, source in bases.items())
        raise ConfigError(f"the targets name different bases: {sources}; choose one with --base")
    model = next(iter(bases))
    try:
        with status(f"loading {model}"):
            return _load(model, folders, args, purpose, device)
    except BaseModelError as error:
        if model in args.target and looks_like_hub_id(Path(model)):
            raise BaseModelError(f"{error} (an adapter {model} was looked for, too)") from error
        raise


def _load(
    model: str, folders: dict[str, Path], args: argparse.Namespace, purpose: str, device: torch.device
) -> LoadedTargets:
    from veneer.checkpoints import attach
    from veneer.checkpoints.receipt import ROUNDED
    from veneer.models.fast_modules import use_fast_forwards
    from veneer.models.load import load_base
    from veneer.models.precision import fast_dtype
    from veneer.training.cpp_kernels import use_cpp_kernels

    requested: Any = args.dtype
    if args.dtype == "auto" and purpose == "generate":
        requested = str(fast_dtype(device, "generate")).removeprefix("torch.")
    task = task_of(folders)
    for name, folder in folders.items() if purpose == "generate" else ():
        if reason := head_refusal(name, folder):
            raise ConfigError(reason)
    quantize = None if args.quantize == "none" else args.quantize
    if quantize == "auto":
        quantize = trained_format(map(receipt_at, folders.values()))
    loaded = load_base(model, dtype=requested, device=device, quantize=quantize, task=task)
    bank = attach(loaded.model)
    for name, folder in folders.items():
        for remark in bank.load(folder, name=name, force=tuple(args.force)).meta.get("notes", ()):
            if args.dtype != "auto" or not remark.endswith(ROUNDED):  # the user did not choose this data type
                note(f"{folder}: {remark}")
        bank[name].requires_grad_(False)
    use_adapter_template(loaded.tokenizer, bank)
    if device.type == "cpu":
        use_cpp_kernels(note)
    use_fast_forwards(loaded.model)
    return LoadedTargets(loaded, bank, list(folders), task)


def task_of(folders: dict[str, Path]) -> str:
    """Return the task that all adapters were trained for, by their receipts or else by PEFT's task type.

    Raises:
        ConfigError: Some have heads, and others have none or heads of another kind.
    """
    tasks = {name: task_of_adapter(folder) for name, folder in folders.items()}
    found = list(dict.fromkeys(tasks.values())) or ["sft"]
    if len(found) > 1:
        listed = ", ".join(f"{name} ({task})" for name, task in tasks.items())
        raise ConfigError(f"the adapters have heads for different tasks: {listed}; give those of one task")
    return found[0]


def use_adapter_template(tokenizer: Any, bank: Bank) -> None:
    """Give the tokenizer the chat template that the adapters were trained with.

    A template in an adapter folder is used if its hash is the one in the receipt. If the adapters need different
    templates, or one that is missing, the base's template stays and a warning is printed.
    """
    if tokenizer is None or not len(bank):
        return
    from veneer.data.hashing import template_hash

    current = template_hash(tokenizer)
    users: dict[str | None, list[str]] = {}  # template (None: the base's) -> adapters
    for name in bank:
        meta = bank[name].meta
        recorded, stored = (meta.get("receipt") or {}).get("template_sha256"), meta.get("template")
        if recorded is None or recorded == current:
            users.setdefault(None, []).append(name)
        elif stored is not None and recorded == template_hash(tokenizer, stored):
            users.setdefault(stored, []).append(name)
        else:
            note(
                f"{name}: the base's chat template or tokenizer is not the one that this adapter was trained with, so "
                "prompts are rendered differently than in training; give the original base folder with --base"
            )
    if len(users) > 1:
        groups = "; ".join(", ".join(group) for group in users.values())
        note(f"the adapters were trained with different chat templates ({groups}); using the base's template")
    elif (template := next(iter(users), None)) is not None:
        tokenizer.chat_template = template
        note(f"{', '.join(users[template])}: using the chat template in the adapter folder")


def base_named_in(folder: Path) -> str:
    """Return the base that the receipt names, if it is an embedded one, else that of ``adapter_config.json``.

    Raises:
        CheckpointError: The file is not valid or names no base.
    """
    recorded = receipt_at(folder).get("base_name")
    if isinstance(recorded, str) and recorded in EMBEDDED:
        return recorded
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig")).get("base_model_name_or_path")
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not a JSON object: {error}") from None
    if not isinstance(found, str) or not found:
        raise CheckpointError(
            f"{folder / CONFIG} does not name the base (base_model_name_or_path); give it with --base"
        )
    return found
