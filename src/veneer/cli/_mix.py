"""Weighted adapters on the command line: ``a:0.7 b:0.3`` or ``a:0.7,b:0.3``; without a number the weight is 1.

Each is what other commands take as a target: an adapter's folder, or a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli._target import adapter_folders
from veneer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from veneer.deltas.parents import Parent

Entry = tuple[Path, str, float]


def parse_mix(words: Sequence[str]) -> list[Entry]:
    """(adapter's folder, name, weight) of each entry, in order.

    Raises ConfigError for weights that are no numbers, CheckpointError for folders that are not there.
    """
    entries: list[Entry] = []
    for word in words:
        parts = [word] if Path(word).exists() else [part for part in word.split(",") if part]
        entries += [_entry(part) for part in parts]
    if not entries:
        raise ConfigError("there is no adapter: give a folder, or several as a:0.7 b:0.3")
    return entries


def base_of(parents: Sequence[Parent], given: str | None) -> str:
    """The base to use: what was given, else what the adapters' folders name. Raises ConfigError where that is not one base."""
    from veneer.deltas.parents import base_name

    name = given or base_name(parent.adapter for parent in parents)
    if name is None:
        raise ConfigError("the adapters do not name one base; give it with --base MODEL")
    return name


def _entry(text: str) -> Entry:
    path, colon, number = text.rpartition(":")
    weight = 1.0
    if not Path(text).exists() and colon:
        try:
            weight = float(number)
        except ValueError:
            raise ConfigError(
                f"{text!r}: there is no such folder, and {number!r} is no weight; write FOLDER:WEIGHT, for example {path or 'a'}:0.7"
            ) from None
        if not math.isfinite(weight):
            raise ConfigError(f"{text!r}: a weight must be a finite number")
    else:
        path = text
    folders = adapter_folders(path)
    if not folders:
        raise CheckpointError(f"{path} is no adapter's folder; give a folder with adapter_config.json, or a run")
    if len(folders) > 1:
        raise ConfigError(f"{path} is a run of several adapters ({', '.join(folders)}); give one of their folders")
    name, folder = next(iter(folders.items()))
    return folder, name, weight
