"""Parent adapters: reading them, checking them against each other and the base, and recording them in the result's receipt.

Receipts hold a sketch of each adapted base weight (`checkpoints/receipt.py`): eight numbers that are the same for the same weights and
move with them. Parents whose sketches of one site differ by more than the rounding between their dtypes were made on different bases, and
their deltas must not be added.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.checkpoints import read_adapter
from veneer.checkpoints.base_files import Skeleton
from veneer.checkpoints.findings import listed
from veneer.checkpoints.receipt import (
    Sketches,
    base_distance,
    base_records,
    labels_of,
    probe,
    probe_agrees,
    receipt_of,
    recorded_base,
    recorded_name,
    rounding_between,
    sketch_distance,
    sketch_of,
    stop_tokens,
    weight_record,
)
from veneer.deltas.delta import Weights
from veneer.errors import ComposeError


@dataclass(frozen=True)
class Parent:
    """An adapter and its weight."""

    adapter: Adapter
    weight: float = 1.0

    @property
    def record(self) -> dict[str, Any]:
        """Its entry in the result's receipt."""
        meta = self.adapter.meta
        return {
            "name": self.adapter.name,
            "weight": self.weight,
            "method": self.adapter.method.name,
            **({"tensors": meta["digest"]} if "digest" in meta else {}),
        }


def classes_of(parents: Sequence[Parent]) -> tuple[str, ...]:
    """The names of the classes that the parents' heads predict; where no receipt has them, LABEL_0 and so on, as transformers names them.

    Raises ComposeError where the parents predict different classes.
    """
    found = {parent.adapter.name: labels_of(parent.adapter) or _numbered(parent.adapter) for parent in parents}
    if len(set(found.values())) > 1:
        named = "; ".join(f"{name}: {', '.join(classes)}" for name, classes in found.items())
        raise ComposeError(
            f"heads for different classes cannot be merged together ({named}); merge adapters of the same classes"
        )
    return next(iter(found.values()))


def _numbered(adapter: Adapter) -> tuple[str, ...]:
    """A name for each output of the narrowest weight that the adapter replaces: the last layer of its head."""
    widths = [
        len(value)
        for own in adapter.overrides.values()
        for key, value in own.items()
        if key == "weight" and value.dim() > 1
    ]
    return tuple(f"LABEL_{number}" for number in range(min(widths, default=2)))


def origin_of(parents: Sequence[Parent]) -> dict[str, Any]:
    """A receipt's entries about the parents: their records, and the hash of the chat template (and tokenizer) that all were trained with,
    or a note if these differ."""
    origin: dict[str, Any] = {"parents": [parent.record for parent in parents]}
    hashes = {parent.adapter.name: receipt_of(parent.adapter).get("template_sha256") for parent in parents}
    if len(set(hashes.values())) > 1:
        each = ", ".join(f"{name}: {str(known)[:12] if known else 'not recorded'}" for name, known in hashes.items())
        origin["notes"] = [f"the parents were trained with different chat templates or tokenizers ({each})"]
    elif (known := next(iter(hashes.values()), None)) is not None:
        origin["template_sha256"] = known
    stops = [stop_tokens(parent.adapter) for parent in parents]
    if stops and all(stops):
        origin["stop_tokens"] = {text: token for record in stops for text, token in record.items()}
    return origin


def template_of(parents: Sequence[Parent]) -> str | None:
    """The chat template in the parents' folders, if all have the same."""
    if len({receipt_of(parent.adapter).get("template_sha256") for parent in parents}) != 1:
        return None
    texts = (parent.adapter.meta.get("template") for parent in parents)
    return next((text for text in texts if isinstance(text, str)), None)


def read_parents(folders: Sequence[tuple[Path, str, float]], *, force: str | Iterable[str] = ()) -> list[Parent]:
    """Read the adapters in (folder, name, weight); a folder that is given twice is read once.

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


def records_for(adapter: Adapter, base: Mapping[str, Any], weights: Weights | None) -> dict[str, Any]:
    """A receipt's entries that identify the base: records of its weights, and probes if the delta depends on them."""
    entries: dict[str, Any] = {"base": {site: base[site] for site in adapter.tensors if site in base}}
    if adapter.method.needs_base_weights and weights is not None:
        entries["probes"] = {site: probe(adapter, site, weights(site)) for site in adapter.tensors}
    return {key: value for key, value in entries.items() if value}


def notes_on_parents(parents: Sequence[Parent]) -> list[str]:
    """Notes on parents that change nothing, and one if they name different bases that no receipts show to be the same."""
    adapters = list({id(parent.adapter): parent.adapter for parent in parents}.values())
    idle = [f"{adapter.name}: {adapter.meta['idle']}" for adapter in adapters if "idle" in adapter.meta]
    names = list(dict.fromkeys(name for adapter in adapters if (name := base_name([adapter])) is not None))
    if len(names) < 2 or all(base_records(adapter) for adapter in adapters):
        return idle
    return [
        *idle,
        f"the parents name different bases ({', '.join(names[:3])}), and not all have a receipt that could tell whether these are one",
    ]


def copy_as(adapter: Adapter, name: str) -> Adapter:
    """A frozen copy of an adapter under another name; it shares no parameter with the first."""
    made: dict[int, Tensor] = {}
    for _, _, value in adapter.named_tensors():
        made[id(value)] = value.detach().clone()
    tensors, overrides = (
        {layer: {key: made[id(value)] for key, value in values.items()} for layer, values in table.items()}
        for table in (adapter.tensors, adapter.overrides)
    )
    alphas = {site: adapter.alpha(site) for site in adapter.tensors}
    twin = Adapter(
        name, adapter.method, tensors, adapter.kinds, overrides=overrides, tokens=adapter.tokens, alphas=alphas
    )
    return twin.requires_grad_(False)


def check_one_base(adapters: Sequence[Adapter]) -> None:
    """Raise ComposeError if the receipts of two adapters have different base weights, or if their folders name different bases and no
    common layer shows that these are equal."""
    first: dict[str, tuple[Adapter, dict[str, Any]]] = {}
    for adapter in adapters:
        for site, record in base_records(adapter).items():
            if site not in first:
                first[site] = (adapter, record)
                continue
            known = first[site][1]
            apart = sketch_distance(known["sketch"], record["sketch"])
            if apart > rounding_between(known.get("dtype"), record.get("dtype")):
                raise ComposeError(
                    f'the adapters "{first[site][0].name}" and "{adapter.name}" were made on different bases: the weight at {site} '
                    f"differs by {apart:.1%} between their receipts; only adapters of one base can be combined"
                )
    for one, other in itertools.combinations({id(adapter): adapter for adapter in adapters}.values(), 2):
        names = base_name([one]), base_name([other])
        if None not in names and names[0] != names[1] and one.tensors.keys().isdisjoint(other.tensors):
            raise ComposeError(
                f'the adapters "{one.name}" and "{other.name}" name different bases ({names[0]} and {names[1]}) and have no layer in '
                "common by which these could be compared; if both are the same base, give --force base"
            )


def check_base(adapter: Adapter, weights: Weights, where: str, sketches: Sketches = sketch_of) -> None:
    """Compare an adapter's receipt with the base's weights; without a receipt there is nothing to compare.

    sketches: computes the numbers that are compared; `kept_sketches` for several adapters on one base.

    Raises ComposeError that counts the sites which differ, or names those whose change (with DoRA) is not what its probe recorded.
    """
    known, renamed = base_records(adapter), adapter.meta.get("names", {})
    apart: dict[str, float] = {}
    altered: list[str] = []
    probes = receipt_of(adapter).get("probes")
    for site, record in known.items():
        weight_OK, name = weights(site), recorded_name(receipt_of(adapter)["base"], site, renamed)
        distant = base_distance(record, sketches(weight_OK, name), weight_OK, name, sketches=sketches)
        if distant is not None:
            apart[site] = distant
        elif adapter.method.needs_base_weights and isinstance(probes, Mapping) and name in probes:
            altered += [] if probe_agrees(probes[name], adapter, site, record, weight_OK, name) else [site]
    if altered and not apart:
        raise ComposeError(
            f'the change of the adapter "{adapter.name}" at {listed(altered)} is not what its receipt recorded: adapter_config.json was '
            "altered after training (r, lora_alpha, use_rslora or a pattern); restore the original file"
        )
    if apart:
        site, share = next(iter(apart.items()))
        raise ComposeError(
            f'the adapter "{adapter.name}" was made on another base than {where}: {len(apart)} of {len(known)} adapted weights '
            f"differ from those in its receipt ({site} by {share:.1%}); give its own base, or --force base"
        )


def records_of(base: Skeleton, sites: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Records of base weights for a receipt, from the files alone: fingerprint, dtype and sketch by site."""
    hashes = base.fingerprints(sites)
    return {site: weight_record(base.weight_2d(site), site, sha, base.format(site)) for site, sha in hashes.items()}


def target_parameters_of(parents: Iterable[Parent]) -> set[str]:
    """Names of weights that the parents' folders have in ``target_parameters``."""
    return {
        name
        for parent in parents
        for name in (parent.adapter.meta.get("settings") or {}).get("target_parameters") or ()
    }


def base_name(adapters: Iterable[Adapter]) -> str | None:
    """The base that the adapters' folders name, if they name one."""
    names = {recorded_base(adapter) for adapter in adapters} - {None}
    return next(iter(names)) if len(names) == 1 else None
