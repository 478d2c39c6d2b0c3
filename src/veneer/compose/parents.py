"""The adapters that something is made from: read, checked against each other and against the base, and named in the result's receipt.

Receipts hold a sketch of each adapted base weight (`checkpoints/receipt.py`): eight numbers that are the same for the same weights and
move with them. Parents whose sketches of one site are far apart were made on different bases, and their changes must not be added.
Here a few percent are no difference: the same weights in bf16 and in fp32 are one base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.checkpoints import read_adapter
from veneer.checkpoints.receipt import eight, signs
from veneer.compose.delta import Weights
from veneer.compose.skeleton import Skeleton
from veneer.errors import ComposeError
from veneer.models.fingerprint import weight_fingerprints
from veneer.models.load import Base

SAME_BASE = 2.0**-7
"""Relative distance of two sketches up to which they are of one weight in two precisions."""


@dataclass(frozen=True)
class Parent:
    """An adapter and the weight with which it takes part."""

    adapter: Adapter
    weight: float = 1.0

    @property
    def record(self) -> dict[str, Any]:
        """What the result's receipt says of it."""
        meta = self.adapter.meta
        return {
            "name": self.adapter.name,
            "weight": self.weight,
            "method": self.adapter.method.name,
            **({"tensors": meta["digest"]} if "digest" in meta else {}),
        }


def read_parents(folders: Sequence[tuple[Path, str, float]], *, force: str | Iterable[str] = ()) -> list[Parent]:
    """Read the adapters in (folder, name, weight); one folder that is given twice is read once.

    Raises CheckpointError for folders that cannot be read, ComposeError for parents of different bases.
    """
    read: dict[Path, Adapter] = {}
    for folder, name, _ in folders:
        if folder not in read:
            read[folder] = read_adapter(folder, name, force=force)
    parents = [Parent(read[folder], weight) for folder, _, weight in folders]
    if "base" not in set([force] if isinstance(force, str) else force):
        check_one_base([parent.adapter for parent in parents])
    return parents


def copy_as(adapter: Adapter, name: str) -> Adapter:
    """The same adapter under another name, frozen; it shares no parameter with the first."""
    made: dict[int, Tensor] = {}
    for _, _, value in adapter.named_tensors():
        made[id(value)] = value.detach().clone()
    tensors, own = (
        {site: {key: made[id(value)] for key, value in held.items()} for site, held in table.items()}
        for table in (adapter.tensors, adapter.own)
    )
    alphas = {site: adapter.alpha(site) for site in adapter.tensors}
    twin = Adapter(name, adapter.method, tensors, adapter.kinds, own=own, tokens=adapter.tokens, alphas=alphas)
    return twin.requires_grad_(False)


def check_one_base(adapters: Sequence[Adapter]) -> None:
    """Raise ComposeError where two adapters' receipts are of different base weights."""
    first: dict[str, tuple[Adapter, list[float]]] = {}
    for adapter in adapters:
        for site, sketch in sketches(adapter).items():
            if site not in first:
                first[site] = (adapter, sketch)
            elif (apart := distance(first[site][1], sketch)) > SAME_BASE:
                raise ComposeError(
                    f'the adapters "{first[site][0].name}" and "{adapter.name}" were made on different bases: the weight at {site} '
                    f"differs by {apart:.1%} between their receipts; adapters of one base can be put together, others not"
                )


def check_base(adapter: Adapter, weights: Weights, where: str) -> None:
    """Hold an adapter's receipt against the base's weights; without a receipt there is nothing to hold against.

    Raises ComposeError that counts the sites which differ.
    """
    known = sketches(adapter)
    apart: dict[str, float] = {}
    for site, sketch in known.items():
        apart[site] = distance(sketch, _sketch(site, weights(site)))
    differ = [site for site, value in apart.items() if value > SAME_BASE]
    if differ:
        raise ComposeError(
            f'the adapter "{adapter.name}" was made on another base than {where}: {len(differ)} of {len(known)} adapted weights '
            f"differ from those in its receipt ({differ[0]} by {apart[differ[0]]:.1%}); give its own base, or --force base"
        )


def sketches(adapter: Adapter) -> dict[str, list[float]]:
    """What an adapter's receipt says of the base's weights: site -> eight numbers; empty without a receipt."""
    records = base_records(adapter)
    return {site: record["sketch"] for site, record in records.items() if _is_sketch(record.get("sketch"))}


def base_records(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """The records of the base's weights in an adapter's receipt."""
    receipt = adapter.meta.get("receipt")
    records = receipt.get("base") if isinstance(receipt, Mapping) else None
    if not isinstance(records, Mapping):
        return {}
    return {
        site: dict(record)
        for site, record in records.items()
        if site in adapter.tensors and isinstance(record, Mapping)
    }


def records_of(base: Skeleton, sites: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a receipt says of base weights, from the files alone: fingerprint, dtype and sketch by site."""
    names = {site: f"{site}.weight" for site in sites}
    files = Base(base.model, None, str(base.folder.path), base.folder.path, torch.float32)
    hashes = weight_fingerprints(files, names.values())
    found = {}
    for site, name in names.items():
        weight_OK = base.weight_2d(site)
        dtype = str(weight_OK.dtype).removeprefix("torch.")
        found[site] = {"sha256": hashes[name], "dtype": dtype, "sketch": _sketch(site, weight_OK)}
    return found


def _sketch(site: str, weight_OK: Tensor) -> list[float]:
    v_K = signs(weight_OK.shape[1], site)
    return eight(torch.cat([rows.float() @ v_K for rows in weight_OK.split(1024)]), site)


def base_name(adapters: Iterable[Adapter]) -> str | None:
    """The base that the adapters' folders name, where they name one and the same."""
    names = {(adapter.meta.get("settings") or {}).get("base_model_name_or_path") for adapter in adapters} - {None, ""}
    return str(next(iter(names))) if len(names) == 1 else None


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two sketches are apart, relative to the first."""
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


def _is_sketch(value: object) -> bool:
    return isinstance(value, list) and len(value) == 8 and all(type(x) in (int, float) for x in value)
