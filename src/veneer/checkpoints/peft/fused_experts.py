"""The factors of experts as PEFT's ``target_parameters`` hold them: one pair of matrices for a fused parameter of a whole stack.

    lora_A [E*R, in]    expert by expert
    lora_B [out, R*E]   rank by rank
    of several parameters of a stack the one declared first is the innermost wrapper: <stack>.base_layer.lora_A

Parts of a fused parameter that share A keep their rank; others stand beside each other, at the sum of their ranks. Ranks are padded with
zeros to the largest of the stack. PEFT has no DoRA and no dropout here.

Shapes: E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.experts import Part
from veneer.checkpoints.base_view import BaseView, StackLayout
from veneer.errors import CheckpointError


@dataclass
class FusedExperts:
    """Fused factors of an adapter, by the names of their wrappers, and the rank and lora_alpha of each fused parameter by its name."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    sites: set[str] = field(default_factory=set)


class _Factors(NamedTuple):
    """Factors of one expert at a fused parameter, the scale in B."""

    a: Tensor
    b: Tensor


def fuse_experts(adapter: Adapter, base: BaseView) -> FusedExperts:
    """The experts' factors of an adapter in PEFT's fused form.

    Raises CheckpointError for a method whose tensors have no fused form, and without a base.
    """
    stacks = list(dict.fromkeys(site.rsplit(".", 2)[0] for site in adapter.tensors if base.is_expert(site)))
    if not stacks:
        raise CheckpointError(
            f'the adapter "{adapter.name}" acts on no stacked experts of this base, so nothing can be fused; leave experts="fused" out'
        )
    found = FusedExperts()
    for stack in stacks:
        layout = base.stack_layout(stack)
        assert layout is not None
        held = {name: _parts_of(adapter, stack, parts) for name, (_, _, parts) in layout.parameters.items()}
        names = [name for name, sites in held.items() if sites]
        for place, name in enumerate(names):
            wrapper = stack + ".base_layer" * (len(names) - 1 - place)
            found.tensors[wrapper] = _fused(adapter, stack, name, held[name], layout, found)
    return found


def _parts_of(adapter: Adapter, stack: str, parts: tuple[Part, ...]) -> dict[str, Part]:
    """{site: its part} of the adapter's sites at a fused parameter."""
    named = {part.name: part for part in parts}
    inside = (site for site in adapter.tensors if site.rsplit(".", 2)[0] == stack)
    return {site: named[site.rpartition(".")[2]] for site in inside if site.rpartition(".")[2] in named}


def _fused(
    adapter: Adapter, stack: str, parameter: str, sites: Mapping[str, Part], layout: StackLayout, found: FusedExperts
) -> dict[str, Tensor]:
    for site in sites:
        if set(adapter.tensors[site]) != {"lora_A", "lora_B"}:
            raise CheckpointError(
                f"{site}: PEFT's target_parameters have no {adapter.method.label}; write each expert's own tensors (experts separate)"
            )
    out, in_, _ = layout.parameters[parameter]
    scales = {adapter.scale(site) for site in sites}
    scale = scales.pop() if len(scales) == 1 else 1.0
    experts = []
    for expert in range(layout.count):
        here = {site: part for site, part in sites.items() if site.rsplit(".", 2)[1] == str(expert)}
        experts.append(_of_expert(adapter, here, scale, out, in_))
    rank = max(len(factors.a) for factors in experts)
    a_ERK, b_EOR = experts[0].a.new_zeros(layout.count, rank, in_), experts[0].a.new_zeros(layout.count, out, rank)
    for expert, (a, b) in enumerate(experts):
        a_ERK[expert, : len(a)], b_EOR[expert, :, : len(a)] = a, b
    if layout.exchanged:
        a_ERK, b_EOR = b_EOR.transpose(1, 2), a_ERK.transpose(1, 2)
    name = f"{stack}.{parameter}"
    found.ranks[name] = rank
    # The lora_alpha that gives the scale at this rank.
    found.alphas[name] = scale / adapter.method.scaling(rank, 1.0)
    found.sites |= set(sites)
    return {"lora_A": a_ERK.flatten(0, 1), "lora_B": b_EOR.permute(1, 2, 0).flatten(1)}


def _of_expert(adapter: Adapter, sites: Mapping[str, Part], scale: float, out: int, in_: int) -> _Factors:
    pairs = []
    for site, part in sites.items():
        tensors = adapter.tensors[site]
        a, b = tensors["lora_A"].detach().float(), tensors["lora_B"].detach().float() * (adapter.scale(site) / scale)
        rows = b.new_zeros(out, b.shape[1])
        rows[part.columns] = b
        pairs.append(_Factors(a, rows))
    if not pairs:
        return _Factors(torch.zeros(0, in_), torch.zeros(out, 0))
    if all(torch.equal(pair.a, pairs[0].a) for pair in pairs):
        return _Factors(pairs[0].a, torch.stack([pair.b for pair in pairs]).sum(0))
    return _Factors(torch.cat([pair.a for pair in pairs]), torch.cat([pair.b for pair in pairs], 1))
