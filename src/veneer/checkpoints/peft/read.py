"""Reads a PEFT folder as an adapter, strictly: every tensor lands at a layer of the base, or the folder is refused.

    parse     settings and header, a few kilobytes
    expand    factors of stacked experts, as those of each expert
    place     the layer of each tensor; names, shapes and ranks against the base
    check     settings against tensors; one pass over the numbers; the base against the receipt
    build     only now are numbers kept, and checked against the receipt

A bad file is refused as early as it can be, with all that a stage found in one error. The tensors tell which layers are adapted and with
which ranks; the settings give the scale, and must agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veneer.adapters.adapter import Adapter
from veneer.checkpoints import receipt as receipts
from veneer.checkpoints.base_view import BaseView
from veneer.checkpoints.files import Folder, parse_json
from veneer.checkpoints.findings import Findings, shown
from veneer.checkpoints.locate import CONFIG, WEIGHTS, of_another_program
from veneer.checkpoints.peft.build import build, check_init
from veneer.checkpoints.peft.checks import check_agreement, check_stored, check_values
from veneer.checkpoints.peft.expert_layouts import expand_experts
from veneer.checkpoints.peft.placement import place
from veneer.checkpoints.peft.settings import read_settings
from veneer.checkpoints.peft.tensor_names import read_keys, today
from veneer.checkpoints.peft.virtual_tokens import build_virtual_tokens, is_virtual_tokens
from veneer.checkpoints.tensors import Header, read_header, read_tensors
from veneer.errors import CheckpointError

TEMPLATE = "chat_template.jinja"
MAX_CONFIG = 2 << 20
MAX_TEMPLATE = 1 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_adapter_folder(
    path: Path, name: str, base: BaseView, *, force: str | Iterable[str] = (), convert: bool = False
) -> Adapter:
    """Read a PEFT folder as an adapter for a base.

    Args:
        path: the folder.
        name: the adapter's name.
        base: the base that it must fit; a plain `BaseView` for none.
        force: checks to override, keys of `findings.CHECKS`.
        convert: turn PiSSA and OLoRA folders into their change to the base.

    Returns:
        The adapter. Its ``meta`` holds "notes", "receipt" (or None), "template" (a chat template in the folder, or None), "path",
        "settings" (the content of adapter_config.json), "digest", and "names" (names in the file of layers that have another name here).

    Raises:
        CheckpointError: everything that is wrong, in one error.
    """
    found = Findings(force)
    headline = f"{path} cannot be loaded{' onto this base' if base.sites else ''}"
    with Folder(path) as folder:
        _check_files(folder)
        raw = parse_json(folder.read(CONFIG, MAX_CONFIG), str(path / CONFIG))
        template = _template(folder)
        if is_virtual_tokens(raw):
            adapter = _read_virtual_tokens(folder, raw, name, base, found)
            adapter.meta |= {"path": str(path), "template": template}
            return adapter
        settings = read_settings(raw, found)
        with folder.open(WEIGHTS) as (file, size):
            header = read_header(file, size, str(path / WEIGHTS))
            keys = read_keys(header, found)
            if settings is None:
                found.raise_if_any(headline)
            assert settings is not None
            keys, names = today(keys, base, found)
            text = header.metadata.get(receipts.KEY, "")
            early = _receipt(header, Findings(found.force)) if '"experts"' in text or '"method"' in text else None
            keys, expansion = expand_experts(keys, settings, base, early, found)
            named, method = {**names, **expansion.named}, (early or {}).get("method")
            placement = place(keys, settings, base, found, named=named, method=method)
            check_init(settings, placement, base, convert, found)
            check_agreement(placement, settings, base, found)
            found.raise_if_any(headline)
            first = Findings(found.force)  # its notes are found again in the numbers that are kept
            check_stored(file, header, placement, settings, str(path / WEIGHTS), first)
            first.raise_if_any(headline)
            receipt = _receipt(header, found)
            base_agrees = receipt is not None and receipts.verify_base(receipt, placement.sites, base, found, names)
            found.raise_if_any(headline)
            stored, digest = read_tensors(file, header, str(path / WEIGHTS))
    expansion.apply(stored)
    adapter = build(name, placement, settings, stored, receipt or {}, base, found)
    adapter.meta["unsplit"] = tuple(expansion.unsplit)
    check_values(adapter, found)
    if receipt is None:
        found.note("no receipt: whether this is the base that the adapter was trained on is not known")
    elif not found.problems:
        receipts.verify(receipt, adapter, digest, base, base_agrees, found, names)
    found.raise_if_any(headline)
    adapter.meta |= {"notes": found.notes, "receipt": receipt, "path": str(path), "settings": raw, "digest": digest}
    adapter.meta |= {"template": template, "names": names}
    return adapter


def _read_virtual_tokens(folder: Folder, raw: Any, name: str, base: BaseView, found: Findings) -> Adapter:
    """`read_adapter_folder` for an adapter whose tensor stands before the sequence."""
    where, headline = (
        str(folder.path / WEIGHTS),
        f"{folder.path} cannot be loaded{' onto this base' if base.sites else ''}",
    )
    with folder.open(WEIGHTS) as (file, size):
        header = read_header(file, size, where)
        receipt = _receipt(header, found)
        stored, digest = read_tensors(file, header, where)
    seed = (receipt or {}).get("seed")
    adapter = build_virtual_tokens(name, raw, stored, seed if type(seed) is int else 0, base, found)
    if adapter is not None and receipt is None:
        found.note("no receipt: whether this is the base that the adapter was trained on is not known")
    elif adapter is not None and receipt is not None:
        agrees = receipts.verify_base(receipt, adapter.tensors, base, found, {}) if base.sites else True
        receipts.verify(receipt, adapter, digest, base, agrees, found, {})
    found.raise_if_any(headline)
    assert adapter is not None
    adapter.meta |= {
        "notes": found.notes,
        "receipt": receipt,
        "settings": raw,
        "digest": digest,
        "names": {},
        "unsplit": (),
    }
    return adapter


def _template(folder: Folder) -> str | None:
    if TEMPLATE not in folder:
        return None
    try:
        return folder.read(TEMPLATE, MAX_TEMPLATE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder.path / TEMPLATE} is not UTF-8 text: byte {error.start}") from None


def _check_files(folder: Folder) -> None:
    _check_case(folder)
    if WEIGHTS not in folder:
        pickled = [name for name in folder.names if name.startswith("adapter_model.") and name.endswith(_PICKLES)]
        if pickled:
            raise CheckpointError(
                f"{folder.path / pickled[0]} is a pickle, which can run code when it is opened, and is not read; convert it where "
                "you trust it: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder) writes adapter_model.safetensors"
            )
        if other := of_another_program(folder.path):
            raise CheckpointError(other)
        if CONFIG not in folder and "config.json" in folder:
            raise CheckpointError(f"{folder.path} holds a base model, not an adapter: there is no {CONFIG}")
        raise CheckpointError(f"{folder.path} holds no {WEIGHTS}; expected a folder with {CONFIG} and {WEIGHTS}")
    if CONFIG not in folder:
        raise CheckpointError(f"{folder.path} holds no {CONFIG}, which says how the tensors of {WEIGHTS} are scaled")


def _check_case(folder: Folder) -> None:
    """Refuse names that differ in case alone: the folder would be another adapter on a file system that ignores case."""
    for expected in (WEIGHTS, CONFIG, TEMPLATE):
        twins = [name for name in folder.names if name != expected and name.casefold() == expected]
        if twins and expected in folder:
            raise CheckpointError(
                f"{folder.path} holds {expected} and {shown(twins[0])}, whose names differ in case alone; remove one of them"
            )
        if twins and expected != TEMPLATE:
            raise CheckpointError(f"{folder.path} holds {shown(twins[0])}; expected {expected}: rename it")


def _receipt(header: Header, found: Findings) -> dict[str, Any] | None:
    text = header.metadata.get(receipts.KEY)
    if text is None:
        return None
    try:
        value = parse_json(text.encode("utf-8", "surrogatepass"), "the receipt")
    except CheckpointError as error:
        found.refuse(str(error), "receipt")
        return None
    if not isinstance(value, dict) or value.get("format") != receipts.FORMAT:
        have = value.get("format") if isinstance(value, dict) else value
        found.refuse(
            f"the receipt is of format {shown(have, 20)}; this version reads format {receipts.FORMAT}", "receipt"
        )
        return None
    return value
