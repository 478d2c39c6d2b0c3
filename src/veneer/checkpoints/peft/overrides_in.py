"""Tensors of a PEFT folder that are no factors: what each one is, by the settings, and where it goes.

    bias            bias = "all" or "lora_only"             a bias of the adapter's own
    lora_B.bias     lora_bias                               a bias of B
    weights         modules_to_save                         layers of the adapter's own: heads, embeddings, norms
    token rows      trainable_token_indices                 rows of the adapter's own
    the rest        an embedding or a head                  a copy of the base's: PEFT writes it where an adapter acts on it, or where the
                                                            vocabulary was resized; it is passed over if it equals the base's

Everything else names a weight of the base, and is refused: PEFT would overwrite the base with it. What is an adapter's own stands in for
the base's in that adapter's cells only (``adapters/overrides.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.adapters.bank import Bank
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.checkpoints.findings import Findings, listed, shown
from veneer.checkpoints.peft.patterns import ends_with
from veneer.checkpoints.peft.settings import Settings
from veneer.checkpoints.peft.tensor_names import Key
from veneer.checkpoints.tensors import Entry


@dataclass
class Whole:
    """own: {place: {"weight", "bias", "rows" or "lora_bias": entry}}. tokens: whose the rows are. copies: what shall be the base's."""

    own: dict[str, dict[str, Entry]] = field(default_factory=dict)
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copies: dict[str, Entry] = field(default_factory=dict)


def plan_whole(
    tensors: list[tuple[Key, Entry]],
    sites: dict[str, dict[str, Entry]],
    settings: Settings,
    bank: Bank | None,
    found: Findings,
) -> Whole:
    """Where each of these tensors goes; what has no place is refused. sites: the adapter's low-rank tensors."""
    whole = Whole()
    for key, entry in tensors:
        name = _own_name(key, sites, settings, bank)
        place = key.site if bank is None else _alias(key.site, key.tensor, bank)
        if name == ROWS:
            _plan_rows(key, entry, settings, bank, whole, found)
        elif name is not None:
            if bank is None or _fits(place, name, entry, bank, found):
                whole.own.setdefault(place, {})[name] = entry
        elif key.kind == "whole" and key.tensor == WEIGHT and _is_vocabulary(key.site, bank):
            if bank is not None and entry.shape != _weight(key.site, bank).shape:
                found.refuse(_other_size(key.site, entry, bank))
            else:
                whole.copies[key.site] = entry
        else:
            found.refuse(foreign(entry.name))
    _check_complete(whole, settings, bank, found)
    return whole


def _own_name(key: Key, sites: dict[str, dict[str, Entry]], settings: Settings, bank: Bank | None) -> str | None:
    """Under which name the adapter has this tensor, or None where the settings do not make it the adapter's own."""
    if key.kind == "rows":
        return ROWS if settings.trainable_token_indices is not None else None
    if key.kind == "lora_bias":
        return LORA_BIAS if settings.lora_bias and not settings.use_dora and key.site in sites else None
    if key.tensor == BIAS and settings.bias != "none" and (settings.bias == "all" or key.site in sites):
        return BIAS
    names = settings.modules_to_save or []
    saved = any(inside(key.site, name) for name in names)
    if settings.ensure_weight_tying and names and not saved and bank is not None and key.site in bank.sites:
        # PEFT also writes a head that follows a saved embedding.
        source = bank.sites[key.site].tied_to
        saved = source is not None and any(inside(source, name) for name in names)
    return key.tensor if saved and not key.beside else None


def inside(path: str, name: str) -> bool:
    """Whether a path is, or lies in, a module whose path ends in ``name``: what PEFT means by ``modules_to_save``."""
    parts = path.split(".")
    return any(".".join(parts[: at + 1]).endswith(name) for at in range(len(parts)))


def _plan_rows(key: Key, entry: Entry, settings: Settings, bank: Bank | None, whole: Whole, found: Findings) -> None:
    declared = settings.trainable_token_indices
    if isinstance(declared, dict):
        tokens = next((ids for name, ids in declared.items() if ends_with(key.site, name)), None)
    else:
        tokens = declared
    if tokens is None:
        found.refuse(f"{shown(entry.name)}: trainable_token_indices does not name {shown(key.site)}")
    elif len(tokens) != entry.shape[0]:
        found.refuse(
            f"{shown(entry.name)} has {entry.shape[0]:,} rows, trainable_token_indices names {len(tokens):,} tokens"
        )
    elif bank is None or _fits(key.site, WEIGHT, None, bank, found):
        highest = max(tokens, default=0)
        if bank is not None and highest >= (rows := _weight(key.site, bank).shape[0]):
            found.refuse(
                f"{shown(entry.name)} has a row for token {highest:,}, the base has {rows:,}: the adapter was made on a resized "
                f"vocabulary; resize the base first: model.resize_token_embeddings({highest + 1}) or more"
            )
            return
        whole.own.setdefault(key.site, {})[ROWS] = entry
        whole.tokens[key.site] = tuple(tokens)


def _fits(place: str, name: str, entry: Entry | None, bank: Bank, found: Findings) -> bool:
    """Whether the base has this layer with this parameter and shape, as one that an adapter can have of its own."""
    if place not in bank.sites and place not in bank.vector_layers:
        found.refuse(f"{shown(place)}: the base has no layer here that an adapter can have of its own")
        return False
    if name == LORA_BIAS:
        shape: tuple[int, ...] = (bank.sites[place].geometry.out,)
    else:
        parameter = _parameter(place, name, bank)
        if parameter is None:
            found.refuse(f"{shown(place)}: the base's layer has no {name}")
            return False
        shape = tuple(parameter.shape)
    if entry is None or entry.shape == shape:
        return True
    vocabulary = name == WEIGHT and _is_vocabulary(place, bank) and entry.shape[1:] == shape[1:]
    if vocabulary and not place.endswith(("score", "classifier")):
        found.refuse(_other_size(place, entry, bank))
    else:
        hint = "; make the base with as many labels" if vocabulary else ""
        found.refuse(f"{shown(entry.name)}: expected shape {shape}, found {entry.shape}{hint}")
    return False


def _alias(place: str, tensor: str, bank: Bank) -> str:
    """The layer that holds a parameter which the model also has under another path (BERT's decoder bias)."""
    if place in bank.sites or place in bank.vector_layers:
        return place
    try:
        parameter = getattr(bank.model.get_submodule(place), tensor, None)
    except AttributeError:
        return place
    twins = (
        site.name
        for site in bank.sites.values()
        if parameter is not None and getattr(site.module, tensor, None) is parameter
    )
    return next(twins, place)


def _check_complete(whole: Whole, settings: Settings, bank: Bank | None, found: Findings) -> None:
    """Every layer that the settings declare as the adapter's own must be in the file, with all that it has."""
    names = settings.modules_to_save or []
    if bank is None:
        if names and not whole.own:
            found.refuse(f"modules_to_save declares {listed(names)}, which the file has no tensors for")
        return
    missing = []
    for site in (*bank.sites.values(), *bank.vector_layers.values()):
        if any(inside(site.name, name) for name in names):
            have = whole.own.get(site.name, {})
            missing += [
                f"{site.name}.{key}"
                for key, _ in site.module.named_parameters(recurse=False)
                if key not in have and key in (WEIGHT, BIAS)
            ]
    if missing:
        found.refuse(f"modules_to_save declares {listed(missing)}, which the file has no tensors for: it is incomplete")


def take_copies(whole: Whole, stored: dict[str, Tensor], bank: Bank | None, found: Findings) -> None:
    """Compare copies of the base's weights with the base, and drop those that are equal; the others are refused, or with
    force="embeddings" become the adapter's own."""
    for site, entry in whole.copies.items():
        if bank is None:
            stored.pop(entry.name)
            found.note(
                f"{shown(site)}: the file has a copy of the base's weight, which was not compared for want of the base"
            )
            continue
        weight = _weight(site, bank)
        if torch.equal(stored[entry.name].to(weight), weight):
            stored.pop(entry.name)
            found.note(f"{shown(site)}: the file has a copy of the base's weight, equal to it, which is passed over")
            continue
        found.refuse(
            f"tensor {shown(entry.name)} differs from the base's own weight: another base, or an embedding that was trained or resized "
            "without being declared in modules_to_save",
            "embeddings",
        )
        whole.own.setdefault(site, {})[WEIGHT] = entry


def own_values(
    whole: Whole, stored: dict[str, Tensor], settings: Settings, bank: Bank | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
    """(values, tokens) of the adapter's own, taken out of ``stored``. Places that share a weight in the base share rows, and with
    ensure_weight_tying the weight."""
    own = {
        place: {key: stored.pop(entry.name).float() for key, entry in parts.items()}
        for place, parts in whole.own.items()
    }
    tokens = dict(whole.tokens)
    for site in bank.sites.values() if bank is not None else ():
        source = own.get(site.tied_to or "", {})
        if ROWS in source and site.name not in own and site.tied_to is not None:
            own[site.name], tokens[site.name] = {ROWS: source[ROWS]}, tokens[site.tied_to]
        head = own.get(site.name, {})
        if (
            settings.ensure_weight_tying
            and WEIGHT in source
            and WEIGHT in head
            and torch.equal(source[WEIGHT], head[WEIGHT])
        ):
            head[WEIGHT] = source[WEIGHT]
    return own, tokens


def foreign(name: str) -> str:
    """Why a tensor of this name is refused."""
    if name.startswith(("lora_unet_", "lora_te", "unet.", "text_encoder.")):
        return f"tensor {shown(name)} is named as diffusion tools do it; expected PEFT's names (base_model.model.<layer>.lora_A.weight)"
    if name.endswith((".weight", ".bias")):
        return f"tensor {shown(name)} is not part of a LoRA or DoRA adapter, and no adapter may change a weight of the base"
    return f"tensor {shown(name)} is not part of a LoRA or DoRA adapter"


def _is_vocabulary(site: str, bank: Bank | None) -> bool:
    """Whether PEFT writes whole weights of this layer on its own account: embeddings and output heads."""
    if bank is None:
        return site.rpartition(".")[2] in ("embed_tokens", "lm_head")
    return site in bank.sites and (bank.sites[site].kind == "embedding" or bank.sites[site].is_head)


def _parameter(place: str, name: str, bank: Bank) -> Tensor | None:
    """A parameter of the base's layer, or None where it has none."""
    site = bank.sites.get(place) or bank.vector_layers[place]
    return dict(site.module.named_parameters(recurse=False)).get(name)


def _weight(place: str, bank: Bank) -> Tensor:
    """The base's weight as it is stored."""
    return (bank.sites.get(place) or bank.vector_layers[place]).weight.detach()


def _other_size(site: str, entry: Entry, bank: Bank) -> str:
    rows = _weight(site, bank).shape[0]
    return (
        f"tensor {shown(entry.name)} has {entry.shape[0]:,} rows, the base's has {rows:,}: the adapter was made on a resized vocabulary; "
        f"resize the base first: model.resize_token_embeddings({entry.shape[0]})"
    )
