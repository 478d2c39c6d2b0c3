"""Merging: a plain state_dict of the base's own names with the change in it.

    W' = W + sum_j w_j (W'_j - W)

Computed from the kept base weight in fp32 (or wider) and rounded once to the stored dtype; nothing is ever subtracted to go back. A
weight that two modules share (a tied embedding and head) is written twice when only one of them is adapted: merging unties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.adapters.layers.site import Site
from veneer.adapters.overrides import own_deltas, own_matrix, vector_changes
from veneer.adapters.runtime.route import Mix
from veneer.errors import AdapterError

if TYPE_CHECKING:
    from veneer.adapters.bank import Bank


def merged_weight(bank: Bank, site: Site, mix: Mix, dtype: torch.dtype | None = None) -> Tensor | None:
    """The merged weight of one site in its stored layout and ``dtype`` (the base's by default), or None if the mix leaves it."""
    base = site.weight_2d
    wide = torch.promote_types(base.dtype, torch.float32)
    merged: Tensor | None = None
    for name, weight in mix:
        adapter = bank[name]
        deltas = []
        if site.name in adapter.tensors:
            deltas.append(adapter.delta_2d(site.name, base))
        elif site.tied_to is not None and adapter.follows_at(site):
            deltas.append(adapter.delta_2d(site.tied_to, base.T).T)
        if site.name in adapter.overrides:
            deltas += own_deltas(adapter, site)
        for delta in deltas:
            merged = (base.to(wide) if merged is None else merged).add(delta.to(wide), alpha=weight)
    if merged is None:
        return None
    return site.layer_kind.delta(site.module, merged).to(dtype or base.dtype).contiguous()


def merged_state_dict(bank: Bank, mix: Mix) -> dict[str, Tensor]:
    """The attached model's state_dict with merged weights in place of adapted ones; what is not adapted is the base's own tensor.

    A module that the model has under several names is written under each. Raises AdapterError where the state_dict has no such name.
    """
    state: dict[str, Tensor] = {name: value.detach() for name, value in bank.model.state_dict().items()}
    for site in bank.sites.values():
        merged = merged_weight(bank, site, mix)
        if merged is None:
            continue
        for path in site.names:
            key = f"{path}.weight" if path else "weight"
            if key not in state:
                raise AdapterError(
                    f'the model\'s state_dict has no "{key}", so the merged weight of {path} would be lost; a hook renames the '
                    "model's tensors: merge before it is installed"
                )
            state[key] = merged
    for key, value in _merged_vectors(bank, mix).items():
        if key not in state:
            raise AdapterError(
                f'the base has no "{key}", which an adapter of the mix has, so it cannot be merged into the base\'s own parameters'
            )
        state[key] = value
    return state


def _merged_vectors(bank: Bank, mix: Mix) -> dict[str, Tensor]:
    """Merged biases, and merged parameters of places, by their names in the model."""
    sums: dict[str, Tensor] = {}
    bases: dict[str, Tensor | None] = {}
    for name, weight in mix:
        adapter = bank[name]
        for place in adapter.overrides:
            site = bank.sites.get(place) or bank.vector_layers[place]
            for key, change in vector_changes(adapter, site).items():
                base: Tensor | None = getattr(site.module, key, None)
                for path in site.names:
                    full = f"{path}.{key}" if path else key
                    bases[full] = base
                    sums[full] = sums.get(full, torch.zeros_like(change)).add(change, alpha=weight)
    merged = {}
    for full, change in sums.items():
        known = bases[full]
        merged[full] = change if known is None else (known.detach().to(change) + change).to(known.dtype)
    return merged


def unties(bank: Bank, mix: Mix) -> list[tuple[str, ...]]:
    """Groups of modules that share a weight in the base and will not after merging ``mix``."""
    apart = set()
    for name, _ in mix:
        adapter = bank[name]
        for group in bank.tied.values():
            touched = {site for site in group if site in adapter.tensors}
            # One tensor of the adapter's own at all of them keeps them together.
            if len({id(own_matrix(adapter, site)) for site in group}) > 1:
                apart.add(group)
            if touched and not (adapter.method.ensure_weight_tying and _follows(bank, group, touched)):
                apart.add(group)
    return sorted(apart)


def _follows(bank: Bank, group: tuple[str, ...], touched: set[str]) -> bool:
    """Whether every module of a group that an adapter has no factors for takes those of an embedding that it has."""
    return all(site in touched or bank.sites[site].tied_to in touched for site in group) and len(touched) == 1
