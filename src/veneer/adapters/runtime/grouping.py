"""Which adapters of a mixed batch are computed together, and what is remembered of that from one step to the next.

Adapters with few cells each stand in one bundle (`kernels/adapted_bundle`): batched products over banks that are padded to the largest
rank. A bundle more costs its calls, a bundle less costs padding, which is read from memory and multiplied, so neighbouring ranks share
one as long as

    padded rows x (in + out) x (1 + cells / 16)  <=  100,000          (times of both on two cores, docs/log.md)

Where nothing is trained, a layer's whole part in a step (which layers share the call, their banks) is kept with the chart of the route
and taken again while the adapters, the weights and the sizes are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.adapters.runtime.forward_pass import Pass
from veneer.adapters.runtime.frozen import states
from veneer.adapters.runtime.mapping import Part
from veneer.kernels.lora.linear import Branch, Grid

if TYPE_CHECKING:
    from veneer.adapters.runtime.forward import AdaptedForward

_FEW_CELLS = 64
"""Adapters with so many cells at most are bundled; above, each one's own products are as fast."""
_WASTE = 100_000
"""Numbers of padding that cost what another bundle does."""
Plan = list[tuple[list[Part], "Grid | None"]]


def plan(host: AdaptedForward, current: Pass, parts: list[Part]) -> Plan:
    """Parts by themselves, and in bundles: adapters with few cells each, of like ranks and numbers of cells, that share no cell."""
    chart = current.chart
    if len(parts) == 1 or not chart.apart:
        return [(parts, None)]
    adapters = [host.bank[name] for name, _, _ in parts]
    ranks = [adapter.rank(host.site.name) for adapter in adapters]
    width = sum(host.site.weight.shape)
    trains = torch.is_grad_enabled()
    key = (tuple((name, id(rows)) for name, rows, _ in parts), tuple(ranks), width, trains)
    known: Plan | None = chart.plans.get(key)
    if known is not None:
        return known
    alone: list[Part] = []
    groups: dict[tuple[object, ...], list[tuple[int, Part]]] = {}
    for part, adapter, rank in zip(parts, adapters, ranks, strict=True):
        rows = part[1]
        if rows is None or len(rows) > _FEW_CELLS or adapter.method.lora_dropout:
            alone.append(part)
        else:
            # A gain costs a layer its output, kept for backward; without one there is nothing to keep apart.
            kind = (adapter.method.keeps_output and trains, (len(rows) - 1).bit_length())
            groups.setdefault(kind, []).append((rank, part))
    made: Plan = [(alone, None)] if alone else []
    for group in (bucket for every in groups.values() for bucket in buckets(every, width)):
        group.sort(key=lambda part: int(part[1][0]))  # type: ignore[index]
        cells = [rows for _, rows, _ in group if rows is not None]
        made.append((group, Grid(cells, [weight for _, _, weight in group]) if len(group) > 1 else None))
    chart.plans[key] = made
    return made


def buckets(ranked: list[tuple[int, Part]], width: int) -> list[list[Part]]:
    """Parts with their ranks, in as few groups as padding allows."""
    ranked = sorted(ranked, key=lambda pair: pair[0])
    found: list[list[Part]] = []
    sums = 0
    for rank, part in ranked:
        size = len(part[1]) if part[1] is not None else 1
        if found:
            group = found[-1]
            padded = rank * (len(group) + 1) - (sums + rank)
            if padded * width * (1 + size / 16) <= _WASTE:
                group.append(part)
                sums += rank
                continue
        found.append([part])
        sums = rank
    return found


@dataclass(frozen=True, eq=False)
class Call:
    """A layer's part in a step where nothing is trained, with all that it depends on.

    hosts: those that share the call. branches: what the kernel takes. lead: the input's leading sizes, None where they do not matter.
    weights: marks of the layers' weights. drops: whether an adapter would drop out in training.
    """

    hosts: list[AdaptedForward]
    branches: list[Branch]
    states: tuple[int, ...]
    weights: tuple[object, ...]
    lead: tuple[int, ...] | None
    dtype: torch.dtype
    drops: bool


def remember(
    hosts: list[AdaptedForward], current: Pass, x: Tensor, branches: list[Branch], weights: tuple[object, ...]
) -> None:
    """Keep a call for the steps to come, if all its adapters are frozen."""
    if torch.is_grad_enabled() or not current.lasting:
        return
    bank, numbers = hosts[0].bank, states(current, hosts[0].bank)
    if numbers is None:
        return
    drops = any(bank[name].method.lora_dropout for name in current.route.names)
    if drops and _training(hosts[0], current):
        return
    lead = None if current.route.uniform else tuple(x.shape[:-1])
    current.chart.calls[hosts[0].site.name] = Call(hosts, branches, numbers, weights, lead, x.dtype, drops)


def recall(host: AdaptedForward, current: Pass, x: Tensor) -> Call | None:
    """What was remembered for this layer, if it holds for this input. Whether layers and weights are as they were is still to be seen."""
    call: Call | None = current.chart.calls.get(host.site.name)
    if call is None or torch.is_grad_enabled() or call.dtype != x.dtype:
        return None
    if call.lead is not None and call.lead != x.shape[:-1]:
        return None
    if call.drops and _training(host, current):
        return None
    return call if states(current, host.bank) == call.states else None


def _training(host: AdaptedForward, current: Pass) -> bool:
    """Whether adapters drop out here."""
    return host.site.module.training if current.training is None else current.training
