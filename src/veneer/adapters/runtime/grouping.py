"""Groups the adapters of a mixed batch that are computed together.

Adapters with few tokens each share one branch (``kernels/lora/grouped.py``): batched products over factors that are padded to the
largest rank. Another group costs its calls; a larger group costs padding, which is read from memory and multiplied. So neighbouring
ranks share a group as long as

    padded rows x (in + out) x (1 + tokens / 16)  <=  100,000         (times of both on two cores, docs/log/mixed_batches.md)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.adapters.runtime.layer import AdaptedLayer
from veneer.adapters.runtime.plan import Assignment, RoutePlan
from veneer.kernels.forms import FEW_TOKENS, forms
from veneer.kernels.lora.linear import TokenGrid

_PADDING = 100_000
"""Padded numbers that cost as much as another group."""
Group = tuple[list[Assignment], "TokenGrid | None"]


def groups_of(layer: AdaptedLayer, plan: RoutePlan, assignments: list[Assignment]) -> list[Group]:
    """Assignments in groups of few tokens, like ranks and like token counts that share no token; the first group is computed singly."""
    if len(assignments) == 1 or not plan.exclusive:
        return [(assignments, None)]
    adapters = [layer.adapters[one.adapter] for one in assignments]
    ranks = tuple(len(at.tensors[at.a]) for at in adapters if at.tensors is not None)
    geometry = layer.site.geometry
    width = geometry.out + geometry.in_
    trains = torch.is_grad_enabled()
    most = FEW_TOKENS if layer.site.weight.is_cpu else forms().grouped_tokens
    key = (tuple((one.adapter, id(one.tokens)) for one in assignments), ranks, width, trains, most)
    known: list[Group] | None = plan.groups.get(key)
    if known is not None:
        return known
    single: list[Assignment] = []
    alike: dict[tuple[object, ...], list[tuple[int, Assignment]]] = {}
    for one, at, rank in zip(assignments, adapters, ranks, strict=True):
        method = at.adapter.method
        if one.tokens is None or len(one.tokens) > most or method.dropout:
            single.append(one)
        else:
            # Keeping the output for backward costs the whole layer's, so methods that do not are kept apart.
            kind = (method.keeps_output and trains, (len(one.tokens) - 1).bit_length())
            alike.setdefault(kind, []).append((rank, one))
    made: list[Group] = [(single, None)] if single else []
    for group in (found for ranked in alike.values() for found in by_rank(ranked, width)):
        group.sort(key=lambda one: int(one.on_cpu[0]))  # type: ignore[index]
        tokens = [one.on_cpu for one in group if one.on_cpu is not None]
        weights, device = [one.weight for one in group], layer.site.device
        made.append((group, TokenGrid(tokens, weights, device) if len(group) > 1 else None))
    plan.groups[key] = made
    return made


def by_rank(ranked: Sequence[tuple[int, Assignment]], width: int) -> list[list[Assignment]]:
    """(rank, assignment) pairs in as few groups as padding allows."""
    found: list[list[Assignment]] = []
    ranks = 0
    for rank, one in sorted(ranked, key=lambda pair: pair[0]):
        size = 1 if one.tokens is None else len(one.tokens)
        if found:
            padded = rank * (len(found[-1]) + 1) - (ranks + rank)
            if padded * width * (1 + size / 16) <= _PADDING:
                found[-1].append(one)
                ranks += rank
                continue
        found.append([one])
        ranks = rank
    return found
