"""A PEFT folder becomes an adapter, strictly: every tensor lands at a layer of the base, or the folder is refused.

Order of work, so that a bad file costs nothing: settings and header (a few kilobytes), then names, shapes and ranks against the
base's own layers, then a look through the numbers (some that are not finite, a change out of proportion), then the base against the
receipt, and only then are numbers kept, and held against the receipt too. Which layers are adapted and with which ranks is read from
the tensors; the settings give the scale, and must agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veneer.adapters.adapter import Adapter
from veneer.adapters.bank import Bank
from veneer.checkpoints import receipt as receipts
from veneer.checkpoints.files import Folder, parse_json
from veneer.checkpoints.findings import Findings, shown
from veneer.checkpoints.locate import CONFIG, WEIGHTS
from veneer.checkpoints.peft.build import build, check_init
from veneer.checkpoints.peft.consistency import check_agreement
from veneer.checkpoints.peft.overrides_in import plan_whole, take_copies
from veneer.checkpoints.peft.placement import check_shapes, plan_tensors
from veneer.checkpoints.peft.settings import read_settings
from veneer.checkpoints.peft.value_checks import check_stored, check_values
from veneer.checkpoints.tensors import Header, read_header, read_tensors
from veneer.errors import CheckpointError

TEMPLATE = "chat_template.jinja"
MAX_CONFIG = 2 << 20
MAX_TEMPLATE = 1 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_adapter_folder(
    path: Path, name: str, bank: Bank | None, *, force: str | Iterable[str] = (), convert: bool = False
) -> Adapter:
    """The adapter in a PEFT folder; with a bank it is held against the bank's base.

    force: what to override, by names of `findings.OVERRIDES`. convert: turn PiSSA and OLoRA folders into the change that they are.

    Raises CheckpointError with everything that is wrong, in one error. ``adapter.meta`` then holds "notes" (what is worth knowing),
    "receipt" (or None), "template" (a chat template in the folder, or None), "path" and "settings" (what adapter_config.json said).
    """
    found = Findings(force)
    headline = f"{path} cannot be loaded" + ("" if bank is None else " onto this base")
    with Folder(path) as folder:
        _check_files(folder)
        raw = parse_json(folder.read(CONFIG, MAX_CONFIG), str(path / CONFIG))
        template = _template(folder)
        settings = read_settings(raw, found)
        with folder.open(WEIGHTS) as (file, size):
            header = read_header(file, size, str(path / WEIGHTS))
            plan = plan_tensors(header, found)
            if settings is not None:
                check_shapes(plan, settings, bank, found)
                check_init(settings, plan, bank, convert, found)
                check_agreement(plan.ranks, settings, bank, found)
                whole = plan_whole(plan.whole, plan.sites, settings, bank, found)
            found.raise_if_any(headline)
            assert settings is not None
            early = Findings(found.force)  # what it notes is noted below, of what is kept
            check_stored(file, header, plan, whole, settings, str(path / WEIGHTS), early)
            early.raise_if_any(headline)
            receipt = _receipt(header, found)
            known = receipt is not None and bank is not None and receipts.verify_base(receipt, plan.sites, bank, found)
            found.raise_if_any(headline)
            stored, digest = read_tensors(file, header, str(path / WEIGHTS))
    take_copies(whole, stored, bank, found)
    adapter = build(name, plan, whole, settings, stored, receipt, bank, found)
    check_values(adapter, found)
    if receipt is None:
        found.note("no receipt: whether this is the base that the adapter was trained on is not known")
    elif not found.problems:
        receipts.verify(receipt, adapter, digest, bank, known, found)
    found.raise_if_any(headline)
    adapter.meta |= {"notes": found.notes, "receipt": receipt, "path": str(path), "settings": raw, "digest": digest}
    adapter.meta["template"] = template
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
                "it is trusted: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder) writes adapter_model.safetensors"
            )
        if CONFIG not in folder and "config.json" in folder:
            raise CheckpointError(f"{folder.path} holds a base model, not an adapter: there is no {CONFIG}")
        raise CheckpointError(f"{folder.path} holds no {WEIGHTS}; expected a folder with {CONFIG} and {WEIGHTS}")
    if CONFIG not in folder:
        raise CheckpointError(f"{folder.path} holds no {CONFIG}, which says how the tensors of {WEIGHTS} are scaled")


def _check_case(folder: Folder) -> None:
    """Refuse names that are one where case does not count: the same folder would be another adapter on another file system."""
    for wanted in (WEIGHTS, CONFIG, TEMPLATE):
        twins = [name for name in folder.names if name != wanted and name.casefold() == wanted]
        if twins and wanted in folder:
            raise CheckpointError(
                f"{folder.path} holds {wanted} and {shown(twins[0])}, whose names differ in case alone; remove the one that is not meant"
            )
        if twins and wanted != TEMPLATE:
            raise CheckpointError(
                f"{folder.path} holds no {wanted}, for which {shown(twins[0])} is another name; expected {wanted}: rename it"
            )


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
