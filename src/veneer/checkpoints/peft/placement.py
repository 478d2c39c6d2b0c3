"""The layer that each tensor of a PEFT folder belongs to, from the header alone, with its shape checked against the base.

Factors and vectors go to the sites that they name. Every other tensor is an override, if the settings declare it:

    bias            bias = "all" or "lora_only"
    lora_B.bias     lora_bias
    weight          modules_to_save                         heads, embeddings, norms
    token rows      trainable_token_indices
    the rest        an embedding or a head                  a copy of the base's weight, skipped if it is equal: PEFT writes it
                                                            beside factors, and after the vocabulary was resized

Everything else names a weight of the base and is refused: PEFT would overwrite the base with it. An override replaces the base's
parameter for the tokens of that adapter only (``adapters/overrides.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from veneer.adapters.methods import Method, method_class_for
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.checkpoints.base_view import BaseView, inside
from veneer.checkpoints.findings import Findings, listed, shown
from veneer.checkpoints.peft.patterns import ends_with
from veneer.checkpoints.peft.settings import MAX_RANK, Settings
from veneer.checkpoints.peft.tensor_names import VECTORS, Key, not_of_an_adapter
from veneer.checkpoints.tensors import Entry


@dataclass
class Placement:
    """The layer of each tensor of a file: {layer: {tensor name: entry}} for factors with vectors, and for overrides."""

    method: Method
    """The method with default options, for the names and shapes of its tensors."""
    sites: dict[str, dict[str, Entry]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """Shapes in memory of a site's tensors."""
    alphas: dict[str, float] = field(default_factory=dict)
    overrides: dict[str, dict[str, Entry]] = field(default_factory=dict)
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    """Names under which the settings mean sites of experts."""
    shared: dict[str, Entry] = field(default_factory=dict)
    """Tensors that belong to no layer."""
    copies: dict[str, Entry] = field(default_factory=dict)
    """Weights that must equal the base's."""

    @property
    def ranks(self) -> dict[str, int]:
        """The first size of A, by site."""
        factors = {site: tensors.get("lora_A", tensors.get("lora_embedding_A")) for site, tensors in self.sites.items()}
        return {site: a.shape[0] for site, a in factors.items() if a is not None}


def place(
    keys: list[tuple[Key, Entry]],
    settings: Settings,
    base: BaseView,
    found: Findings,
    *,
    named: Mapping[str, str] | None = None,
    method: object = None,
) -> Placement:
    """Give every tensor its layer; what has none, or does not fit, is refused.

    named: names of sites in the settings. method: the name of the method in the receipt.
    """
    placement = Placement(method_class_for(settings, method)(), named=named or {})
    for key, entry in keys:
        if key.kind == "low_rank":
            placement.sites.setdefault(key.site, {})[key.tensor] = entry
    for site in placement.sites:
        _place_site(site, placement, settings, base, found)
    for key, entry in keys:
        if key.kind == "shared" and key.tensor in placement.method.shared_names:
            placement.shared[key.tensor] = entry
        elif key.kind == "shared":
            found.refuse(not_of_an_adapter(entry.name))
        elif key.kind != "low_rank":
            _place_override(key, entry, placement, settings, base, found)
    missing = base.missing_overrides(settings.modules_to_save or (), placement.overrides)
    if missing:
        found.refuse(f"modules_to_save declares {listed(missing)}, which the file has no tensors for: it is incomplete")
    return placement


def stored_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape in which PEFT stores a tensor: that of a convolution's vector is [1, out, 1, 1]."""
    return (1, *shape, 1, 1) if kind == "conv2d" and len(shape) == 1 else shape


def _place_site(site: str, placement: Placement, settings: Settings, base: BaseView, found: Findings) -> None:
    problem = base.site_problem(site, suggest=len(found.problems) < 3)
    if problem:
        found.refuse(problem)
        return
    tensors, method = placement.sites[site], placement.method
    own = VECTORS if method.low_rank else ()
    factors = {name: entry.shape for name, entry in tensors.items() if name not in own}
    kind = placement.kinds[site] = base.kind(site, factors, fan_in_fan_out=settings.fan_in_fan_out)
    expected = method.tensor_names(kind)
    missing = [name for name in expected if name not in tensors]
    if missing:
        found.refuse(f"{shown(site)}: {', '.join(missing)} is missing beside {', '.join(tensors)}")
    for name in tensors:
        if name not in expected:
            flags = ", ".join(f"{key} is {str(value).lower()}" for key, value in method.flags.items())
            why = f"{flags} in adapter_config.json" if name in VECTORS else f"the layer is a {kind} layer"
            why = why if expected else f"it is a {method.label} adapter, which has no such tensors"
            found.refuse(f"{shown(site)}: {name} does not belong here: {why}")
    if missing or not expected:
        return
    dimensions = [len(tensors[name].shape) for name in expected]
    if any(dimensions[at] < least for at, least in enumerate(method.least_dimensions)):
        found.refuse(f"{shown(site)}: expected matrices, found the shapes {[tensors[name].shape for name in expected]}")
        return
    first = factors[expected[0]][0]
    if first > MAX_RANK and method.low_rank:
        found.refuse(f"{shown(site)}: rank {first:,}; at most {MAX_RANK:,} is read")
        return
    shapes = method.tensor_shapes(base.geometry(site, method.geometry(kind, factors)), factors)
    placement.shapes[site] = shapes
    for name, shape in shapes.items():
        entry, stored = tensors[name], stored_shape(shape, kind)
        if entry.shape != stored:
            found.refuse(f"{shown(entry.name)}: expected shape {stored}, found {entry.shape}")


def _place_override(
    key: Key, entry: Entry, placement: Placement, settings: Settings, base: BaseView, found: Findings
) -> None:
    name, layer = _override_name(key, placement, settings, base), base.holder(key.site, key.tensor)
    if name == ROWS:
        problem = _rows_problem(key, entry, placement, settings, base)
    elif name is not None:
        problem = base.override_problem(layer, name, entry.name, entry.shape)
    elif key.kind == "whole" and key.tensor == WEIGHT and base.is_vocabulary(key.site):
        problem = base.override_problem(key.site, WEIGHT, entry.name, entry.shape)
        placement.copies[key.site] = entry
    else:
        problem = not_of_an_adapter(entry.name)
    if problem:
        found.refuse(problem)
    elif name is not None:
        placement.overrides.setdefault(layer, {})[name] = entry


def _override_name(key: Key, placement: Placement, settings: Settings, base: BaseView) -> str | None:
    """The name of the override that the settings make of a tensor, or None."""
    if key.kind == "rows":
        return ROWS if settings.trainable_token_indices is not None else None
    if key.kind == "lora_bias":
        taken = settings.lora_bias and LORA_BIAS in placement.method.overrides_beside and key.site in placement.sites
        return LORA_BIAS if taken else None
    if key.tensor == BIAS and settings.bias != "none" and (settings.bias == "all" or key.site in placement.sites):
        return BIAS
    names = settings.modules_to_save or []
    saved = any(inside(key.site, name) for name in names)
    if settings.ensure_weight_tying and not saved:
        # PEFT also writes a head that follows a saved embedding.
        source = base.tied_to(key.site)
        saved = source is not None and any(inside(source, name) for name in names)
    return key.tensor if saved and not key.beside else None


def _rows_problem(key: Key, entry: Entry, placement: Placement, settings: Settings, base: BaseView) -> str:
    declared = settings.trainable_token_indices
    if isinstance(declared, dict):
        declared = next((ids for name, ids in declared.items() if ends_with(key.site, name)), None)
    if declared is None:
        return f"{shown(entry.name)}: trainable_token_indices does not name {shown(key.site)}"
    if len(declared) != entry.shape[0]:
        return (
            f"{shown(entry.name)} has {entry.shape[0]:,} rows, trainable_token_indices names {len(declared):,} tokens"
        )
    placement.tokens[key.site] = tuple(declared)
    return base.rows_problem(key.site, entry.name, declared)
