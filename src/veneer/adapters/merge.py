"""Merging: a plain state_dict with the base's own names and the change in its weights.

    W' = W + sum_j w_j (W'_j - W)

Computed from the kept base weight in fp32 (or wider) and rounded once to the stored dtype; nothing is ever subtracted to go back. A
weight that two modules share (a tied embedding and head) is written twice when only one of them is adapted: merging unties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.experts import ExpertLinear
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.overrides import matrix_deltas, override_matrix, vector_deltas
from veneer.errors import AdapterError
from veneer.kernels.quantized.state import is_companion

Weighted = Sequence[tuple[Adapter, float]]


def check_mergeable(adapter: Adapter) -> None:
    """Raise AdapterError for an adapter whose change no weights can hold."""
    if adapter.method.no_delta:
        raise AdapterError(
            f'"{adapter.name}" is a {adapter.method.label} adapter and cannot be merged: {adapter.method.no_delta}; use it beside the base'
        )


def merged_weight(site: Site, mix: Weighted, dtype: torch.dtype | None = None) -> Tensor | None:
    """The merged weight of one site in its stored layout and ``dtype`` (the base's by default), or None if the mix leaves it."""
    replaced = _replacement(site.name, "weight", mix)
    if replaced is not None and site.kind != "vector_layer":
        return replaced.to(site.weight.device, dtype or site.dtype).contiguous()
    base = site.weight_2d
    wide = torch.promote_types(base.dtype, torch.float32)
    merged: Tensor | None = None
    for adapter, weight in mix:
        deltas = []
        if site.name in adapter.tensors:
            deltas.append(adapter.delta_2d(site.name, base))
        elif site.tied_to is not None and adapter.follows_at(site):
            deltas.append(adapter.delta_2d(site.tied_to, base.T).T)
        if site.name in adapter.overrides:
            deltas += matrix_deltas(adapter, site)
        for delta in deltas:
            merged = (base.to(wide) if merged is None else merged).add(delta.to(wide), alpha=weight)
    if merged is None:
        return None
    return site.layer_kind.stored(site.module, merged).to(dtype or base.dtype).contiguous()


def _replacement(layer: str, key: str, mix: Weighted) -> Tensor | None:
    """The trained parameter itself, where one adapter of weight one replaces it and nothing else changes it."""
    found = [(adapter, weight) for adapter, weight in mix if layer in adapter.tensors or layer in adapter.overrides]
    if len(found) != 1 or found[0][1] != 1 or layer in found[0][0].tensors:
        return None
    value = found[0][0].overrides[layer].get(key)
    return None if value is None or "lora_bias" in found[0][0].overrides[layer] else value.detach()


def merged_state_dict(model: nn.Module, survey: Survey, mix: Weighted) -> dict[str, Tensor]:
    """The attached model's state_dict with merged weights in place of adapted ones; what is not adapted is the base's own tensor.

    A merged weight is dense where the base's is quantized.
    A module that the model has under several names is written under each. Raises AdapterError where the state_dict has no such name.
    """
    for adapter, _ in mix:
        check_mergeable(adapter)
    state: dict[str, Tensor] = {name: value.detach() for name, value in model.state_dict().items()}
    stacks: set[str] = set()
    for site in survey.sites.values():
        merged = merged_weight(site, mix)
        if merged is None:
            continue
        for path in site.host.names:
            parameter = site.module.part.parameter if isinstance(site.module, ExpertLinear) else "weight"
            key = f"{path}.{parameter}" if path else parameter
            if isinstance(site.module, ExpertLinear) and site.module.quantized is not None and key not in stacks:
                stacks.add(key)
                _drop_stack(state, key)
                state[key] = getattr(site.host.module, parameter).dense()
            if key not in state:
                raise AdapterError(
                    f'the model\'s state_dict has no "{key}", so the merged weight of {path} would be lost; a hook renames the '
                    "model's tensors: merge before it is installed"
                )
            if isinstance(site.module, ExpertLinear):
                # Written into a copy of the stack, which all its experts share.
                if key not in stacks:
                    stacks.add(key)
                    state[key] = state[key].clone()
                site.module.view_of(state[key]).copy_(merged)
                continue
            if site.layer_kind.quantized(site.module) is not None:
                _drop_companions(state, path)
            state[key] = merged
    for key, value in _merged_vectors(survey, mix).items():
        if key not in state:
            raise AdapterError(
                f'the base has no "{key}", which an adapter of the mix has, so it cannot be merged into the base\'s own parameters'
            )
        state[key] = value
    return state


def _drop_companions(state: dict[str, Tensor], path: str) -> None:
    """Remove the scales of a quantized weight, which its dense successor does not have."""
    prefix = f"{path}." if path else ""
    for key in [key for key in state if key.startswith(prefix) and is_companion(key.removeprefix(prefix))]:
        del state[key]


def _drop_stack(state: dict[str, Tensor], parameter: str) -> None:
    """Remove the tensors of the quantized weights of a stack's experts, which its dense successor does not have."""
    for key in [key for key in state if key.startswith(f"{parameter}.")]:
        del state[key]


def _merged_vectors(survey: Survey, mix: Weighted) -> dict[str, Tensor]:
    """Merged biases, and merged parameters of vector layers, by their names in the model."""
    sums: dict[str, Tensor] = {}
    bases: dict[str, Tensor | None] = {}
    exact: dict[str, Tensor] = {}
    for adapter, weight in mix:
        for name in dict.fromkeys([*adapter.tensors, *adapter.overrides]):
            site = survey.site(name)
            for key, change in vector_deltas(adapter, site).items():
                base: Tensor | None = getattr(site.module, key, None)
                value = _replacement(name, key, mix)
                for path in site.names:
                    full = f"{path}.{key}" if path else key
                    bases[full] = base
                    sums[full] = sums.get(full, torch.zeros_like(change)).add(change, alpha=weight)
                    if value is not None and base is not None:
                        exact[full] = value.to(base.device, base.dtype)
    merged = {}
    for full, change in sums.items():
        known = bases[full]
        merged[full] = change if known is None else (known.detach().to(change) + change).to(known.dtype)
    return merged | exact


def unties(survey: Survey, mix: Weighted) -> list[tuple[str, ...]]:
    """Groups of modules that share a weight in the base and will not after merging ``mix``."""
    apart = set()
    for adapter, _ in mix:
        for group in survey.tied.values():
            touched = {site for site in group if site in adapter.tensors}
            # One override that all of them share keeps them together.
            if len({id(override_matrix(adapter, site)) for site in group}) > 1:
                apart.add(group)
            if touched and not (adapter.method.ensure_weight_tying and _follows(survey, group, touched)):
                apart.add(group)
    return sorted(apart)


def _follows(survey: Survey, group: tuple[str, ...], touched: set[str]) -> bool:
    """True if every module of a group without factors takes those of an embedding that the adapter has."""
    return all(site in touched or survey.sites[site].tied_to in touched for site in group) and len(touched) == 1
