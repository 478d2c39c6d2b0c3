"""What a user points at: a run, an adapter's folder or a base. The same words work for every command that reads one.

runs/a                a run: its adapter (runs/a/adapter, or each job's under runs/a/adapters)
runs/a/best           an adapter's folder
smollm2-135m          a base: its alias, a folder, a GGUF file or a hub id
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.checkpoints.locate import CONFIG, adapters_at, is_run
from veneer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import argparse

    from veneer.adapters import Bank
    from veneer.models.load import Base


@dataclass
class Loaded:
    """A base in memory with the adapters that were pointed at, ``names`` in the order given (none for a base alone)."""

    base: Base
    bank: Bank
    names: list[str]

    @property
    def route(self) -> str | None:
        """The first adapter, or the base."""
        return self.names[0] if self.names else None


def add_target_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The arguments that say what to load."""
    what = "a run, an adapter's folder or a base; NAME=FOLDER gives an adapter another name"
    parser.add_argument("target", nargs="+" if several else 1, metavar="TARGET", help=what)
    parser.add_argument(
        "--base", metavar="MODEL", help="the base, where the adapter's folder does not name it (or another one)"
    )
    what = "load in spite of a check: base, receipt, config, scale or embeddings"
    parser.add_argument("--force", action="append", default=[], metavar="WHAT", help=what)
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="numbers of the base's weights"
    )


def adapter_folders(target: str) -> dict[str, Path]:
    """Adapters behind what a user typed, by name: none if it is a base.

    Raises CheckpointError for a folder that holds neither a base nor an adapter.
    """
    name, _, typed = target.rpartition("=")
    path = Path(typed)
    found = adapters_at(path)
    if found:
        return {name: next(iter(found.values()))} if name and len(found) == 1 else found
    if not path.is_dir():
        if name:
            raise CheckpointError(f"{typed}: there is no such folder to name {name!r}")
        return {}
    if is_run(path):
        raise CheckpointError(
            f"{path} is a run that has not written an adapter yet; run its training command again to go on"
        )
    if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        raise CheckpointError(
            f"{path} holds neither a base (config.json) nor an adapter ({CONFIG}); point at one of these"
        )
    return {}


def load_targets(
    targets: list[str], base: str | None, dtype: str, *, purpose: str = "generate", force: Sequence[str] = ()
) -> Loaded:
    """Load the base once and every adapter that was pointed at, with the faster forms of what they compute.

    Raises ConfigError where targets disagree on the base, or two adapters have one name; whatever loading raises.
    """
    folders: dict[str, Path] = {}
    bases: dict[str, str] = {} if base is None else {base: "--base"}
    for target in targets:
        found = adapter_folders(target)
        if not found:
            bases.setdefault(target, "the command line")
        for name, folder in found.items():
            if name in folders:
                raise ConfigError(
                    f'two adapters are called "{name}": {folders[name]} and {folder}; write NAME={folder} for one'
                )
            folders[name] = folder
            if base is None:
                bases.setdefault(base_named_in(folder), str(folder))
    if len(bases) > 1:
        said = "; ".join(f"{model} (from {source})" for model, source in bases.items())
        raise ConfigError(f"the targets name different bases: {said}; give one with --base")
    return _load(next(iter(bases)), folders, dtype, purpose, force)


def _load(model: str, folders: dict[str, Path], dtype: str, purpose: str, force: Sequence[str]) -> Loaded:
    from veneer.checkpoints import attach
    from veneer.checkpoints.receipt import ROUNDED
    from veneer.models.fast_modules import fuse
    from veneer.models.load import load_base
    from veneer.models.precision import fast_dtype
    from veneer.training.acceleration import use_native

    wanted: Any = dtype
    if dtype == "auto" and purpose == "generate":
        wanted = str(fast_dtype("cpu", "generate")).removeprefix("torch.")
    loaded = load_base(model, dtype=wanted)
    bank = attach(loaded.model)
    for name, folder in folders.items():
        for note in bank.load(folder, name=name, force=tuple(force)).meta.get("notes", ()):
            if dtype != "auto" or not note.endswith(ROUNDED):  # the command chose the numbers itself
                print(f"{folder}: {note}", file=sys.stderr)
        bank[name].requires_grad_(False)
    take_template(loaded.tokenizer, bank)
    use_native(lambda line: print(line, file=sys.stderr))
    fuse(loaded.model)
    return Loaded(loaded, bank, list(folders))


def take_template(tokenizer: Any, bank: Bank) -> None:
    """Hold the tokenizer and its chat template against those that the adapters were trained with; a template that lies in an adapter's
    folder, and is the one that its receipt names, takes the place of the base's. What cannot be had is told."""
    if tokenizer is None or not len(bank):
        return
    from veneer.data.hashing import template_hash

    here = template_hash(tokenizer)
    wanted: dict[str | None, list[str]] = {}
    for name in bank:
        meta = bank[name].meta
        recorded, own = (meta.get("receipt") or {}).get("template_sha256"), meta.get("template")
        if recorded is None or recorded == here:
            wanted.setdefault(None, []).append(name)
        elif own is not None and recorded == template_hash(tokenizer, own):
            wanted.setdefault(own, []).append(name)
        else:
            print(
                f"{name}: the base's chat template or tokenizer is not the one that this adapter was trained with, so its prompts read "
                "otherwise than in training; give the base's folder as it was then with --base",
                file=sys.stderr,
            )
    if len(wanted) > 1:
        names = "; ".join(", ".join(group) for group in wanted.values())
        print(
            f"these adapters were trained with different chat templates ({names}); the base's is used", file=sys.stderr
        )
    elif (own := next(iter(wanted), None)) is not None:
        tokenizer.chat_template = own
        print(f"{', '.join(wanted[own])}: the chat template is the one in the adapter's folder", file=sys.stderr)


def base_named_in(folder: Path) -> str:
    """The base that an adapter's settings name. Raises CheckpointError where they name none."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not a JSON object: {error}") from None
    if not isinstance(found, str) or not found:
        raise CheckpointError(
            f"{folder / CONFIG} does not name its base (base_model_name_or_path); give it with --base"
        )
    return found
