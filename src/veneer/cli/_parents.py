"""Weighted adapters on the command line, ``a:0.7 b:0.3`` or ``a:0.7,b:0.3``, and the base that they belong to.

Each entry is an adapter folder or a run; the default weight is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer._terminal import note, status
from veneer.checkpoints.locate import (
    adapters_at,
    choice_note,
    find_adapter,
    is_run,
    task_of_adapter,
    trained_format,
)
from veneer.cli._targets import not_an_adapter
from veneer.errors import ConfigError, VeneerError

if TYPE_CHECKING:
    from veneer.checkpoints.base_files import Skeleton
    from veneer.deltas.parents import Parent

Entry = tuple[Path, str, float]
"""Adapter folder, name, weight."""


def parse_mix(words: Sequence[str]) -> list[Entry]:
    """Parse weighted adapters, in order.

    Raises:
        ConfigError: A weight is not a finite number.
        CheckpointError: A path does not lead to one adapter.
    """
    entries: list[Entry] = []
    for word in words:
        parts = [word] if Path(word).exists() else [part for part in word.split(",") if part]
        entries += [_entry(part) for part in parts]
    if not entries:
        raise ConfigError("no adapter given; name a folder, or several with weights: a:0.7 b:0.3")
    return entries


def base_of(parents: Sequence[Parent], given: str | None) -> str:
    """Return the base to use: ``given``, or else the one that all adapter folders name.

    Raises:
        ConfigError: No base is given, and the folders do not agree on one.
    """
    from veneer.deltas.parents import base_name

    name = given or base_name(parent.adapter for parent in parents)
    if name is None:
        raise ConfigError("the adapter folders do not name one base; give it with --base MODEL")
    return name


@status("reading the base")
def checked_base(
    parents: Sequence[Parent], given: str | None, force: Sequence[str], quantize: str = "auto", task: str = "sft"
) -> tuple[str, Skeleton]:
    """Open the files of the parents' base, and check that every parent fits it and was made on it.

    Args:
        parents: the adapters.
        given: the base that was asked for, if one was.
        force: checks to skip.
        quantize: the format in which plain weights are taken, "none", or "auto" for that of the parents' training.
        task: the task of the parents' heads, for the base with such a head.

    Returns:
        The name of the base, and its files.

    Raises:
        ComposeError: A parent does not fit the base or, without ``force`` of "base", was made on another one.
    """
    from veneer.checkpoints.base_files import base_folder, fit, skeleton, skeleton_with_head
    from veneer.checkpoints.receipt import kept_sketches, receipt_of
    from veneer.deltas.parents import check_base, classes_of
    from veneer.models.classifiers.heads import HEADS

    name = base_of(parents, given)
    format = trained_format(receipt_of(parent.adapter) for parent in parents) if quantize == "auto" else quantize
    if task in HEADS:
        base = skeleton_with_head(base_folder(name), task, () if task == "regression" else classes_of(parents))
    else:
        base = skeleton(base_folder(name), None if format == "none" else format)
    sketches = kept_sketches()
    for adapter in {id(parent.adapter): parent.adapter for parent in parents}.values():
        fit(adapter, base)
        if "base" not in force:
            check_base(adapter, base.weight_2d, name, sketches)
    return name, base


def stops_of(parents: Sequence[Parent], folder: Path, template: str | None = None) -> tuple[dict[str, int], list[int]]:
    """Return the stop tokens of the parents' answers, {text: id}, and the base's own end tokens.

    Args:
        parents: the adapters.
        folder: the base's folder.
        template: a chat template to use instead of the base's.
    """
    from veneer.checkpoints.receipt import receipt_of, stop_tokens
    from veneer.data.chat.render import Renderer, RenderOptions
    from veneer.data.chat.stops import stop_ids
    from veneer.models.load import end_ids, load_tokenizer

    own = end_ids(folder)
    if any(receipt_of(parent.adapter).get("labels") is not None for parent in parents):
        return {}, own  # a head answers nothing that could end
    recorded = [stop_tokens(parent.adapter) for parent in parents]
    try:
        tokenizer = load_tokenizer(folder)
        renderer = Renderer(tokenizer, RenderOptions(chat_template=template))
        ids = stop_ids(renderer, own, recorded)
    except VeneerError:  # no tokenizer, or none that masks can be made with: the records remain
        return {text: token for record in recorded for text, token in record.items()}, own
    return {str(tokenizer.convert_ids_to_tokens(token)): token for token in ids}, own


def task_of(entries: Sequence[Entry]) -> str:
    """Return the task of all these adapters; sft for adapters without a head.

    Raises:
        ComposeError: They have different tasks.
    """
    from veneer.errors import ComposeError

    tasks = {path: task_of_adapter(path) for path, _, _ in entries}
    if len(set(tasks.values())) > 1:
        found = ", ".join(f"{path} ({task})" for path, task in tasks.items())
        raise ComposeError(f"adapters of different tasks cannot be merged together: {found}; merge those of one task")
    return next(iter(tasks.values()))


def needs_base_weights(parents: Sequence[Parent]) -> bool:
    """Tell whether the change of some parent can only be computed from the base weights."""
    return any(parent.adapter.method.needs_base_weights for parent in parents)


def _entry(text: str) -> Entry:
    path, colon, number = text.rpartition(":")
    weight = 1.0
    if not Path(text).exists() and colon:
        try:
            weight = float(number)
        except ValueError:
            raise ConfigError(
                f"{text!r}: there is no such folder, and {number!r} is not a weight; "
                f"write FOLDER:WEIGHT, for example {path or 'a'}:0.7"
            ) from None
        if not math.isfinite(weight):
            raise ConfigError(f"{text!r}: expected a finite weight, found {number}")
    else:
        path = text
    if not adapters_at(Path(path)) and not is_run(Path(path)):
        raise not_an_adapter(path)
    name, folder = find_adapter(Path(path))
    if (remark := choice_note(Path(path), folder)) is not None:
        note(remark)
    return folder, name, weight
