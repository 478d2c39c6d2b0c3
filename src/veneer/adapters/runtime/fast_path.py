"""Which layers take the fast form, and how layers that read the same input share one call of it.

The fast form (`kernels/adapted_linear`) is for plain frozen linear layers (and Conv1D), with LoRA of any kind and with DoRA whose norm is a
constant. Everything else takes the plain form: other layer kinds, layers with a forward of their own, weights that are trained or
quantized, autocast, DoRA in a weighted mix or where the model goes on in place on the output, PEFT's form of DoRA dropout, tied
heads.

Layers that were seen at attach to read the same input one after the other (q, k, v; gate, up) are computed when the first of them is
called, and the others find their output ready, if what they are given is that very tensor, unchanged. Each layer stays a host of its
own: hooks on it run as ever, and one that is handed something else computes for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.adapters.runtime.forward_pass import Pass
from veneer.adapters.runtime.frozen import generation, keep, states
from veneer.adapters.runtime.grouping import plan, recall, remember
from veneer.adapters.runtime.mapping import Part
from veneer.adapters.runtime.recompute import Ready
from veneer.kernels.lora.linear import (
    Branch,
    Bundle,
    Factors,
    Grid,
    Layer,
    Native,
    Run,
    Share,
    adapted_linear,
    fits,
    stack,
)

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter
    from veneer.adapters.runtime.forward import AdaptedForward

_PLAIN = (Tensor, nn.Parameter)
_FEW = {torch.float32: 64}
"""Up to so many cells of a frozen adapter are computed faster without the kernels in C++, with what is kept of it (docs/log.md)."""


def fused(host: AdaptedForward, current: Pass, parts: list[Part], x: Tensor) -> Tensor | None:
    """The layer's output with its adapters, or None where the plain form is to be taken."""
    bank = host.bank
    if not bank.fused or not _fits(host, x) or not all(_can(host, current, part) for part in parts):
        return None
    found = _taken(host, current, x)
    if found is not None:
        return found
    hosts = [host, *_siblings(host, current, parts, x)]
    layers = [_layer(each) for each in hosts]
    branches, left = _native(hosts, layers, current, parts, x)
    branches += [
        branch
        for number, (group, grid) in enumerate(plan(host, current, left) if left else ())
        for branch in _branches(hosts, layers, current, group, grid, number)
    ]
    remember(hosts, current, x, branches, _marks(layers))
    return _run(hosts, layers, branches, current, x)


def again(host: AdaptedForward, current: Pass, x: Tensor) -> Tensor | None:
    """The layer's output as in an earlier call that was the same but for its numbers, or None where there was none.

    Spares a step of decoding the search for what it will compute.
    """
    bank, chart = host.bank, current.chart
    if chart.owned is None:
        chart.owned = any(bank[name].overrides for name in current.route.names)
    if chart.owned or not bank.fused or not _fits(host, x):
        return None
    found = _taken(host, current, x)
    if found is not None:
        return found
    call = recall(host, current, x)
    if call is None or not all(_fits(each, x) for each in call.hosts[1:]):
        return None
    layers = [_layer(each) for each in call.hosts]
    return _run(call.hosts, layers, call.branches, current, x) if _marks(layers) == call.weights else None


def _taken(host: AdaptedForward, current: Pass, x: Tensor) -> Tensor | None:
    """The output, where a layer that reads the same input has computed it along."""
    state = host.bank.traffic.state
    ready, state.ready = state.ready, None
    if ready is None or ready.mark != _mark(x, current) or host.site.name not in ready.outputs:
        return None
    state.ready = ready
    return ready.outputs.pop(host.site.name)


def _run(hosts: list[AdaptedForward], layers: list[Layer], branches: list[Branch], current: Pass, x: Tensor) -> Tensor:
    first, *others = adapted_linear(x, layers, branches)
    if others:
        names = [each.site.name for each in hosts[1:]]
        hosts[0].bank.traffic.state.ready = Ready(x, current, _mark(x, current), dict(zip(names, others, strict=True)))
    return first


def _marks(layers: list[Layer]) -> tuple[object, ...]:
    """What changes when a weight does."""
    return tuple((w.dtype, w.data_ptr(), -1 if w.is_inference() else w._version) for w, _ in layers)


def _native(
    hosts: list[AdaptedForward], layers: list[Layer], current: Pass, parts: list[Part], x: Tensor
) -> tuple[list[Branch], list[Part]]:
    """Adapters that kernels in C++ can take, as one branch where they share no cell, and the parts that are left."""
    if not fits(layers):
        return [], parts
    bank, spans = hosts[0].bank, current.chart.spans
    cells = x.numel() // max(1, x.shape[-1])
    runs: list[Run] = []
    left: list[Part] = []
    for part in parts:
        name, rows, weight = part
        adapter = bank[name]
        where = None if rows is None else spans.get(id(rows))
        few = not torch.is_grad_enabled() and (cells if rows is None else len(rows)) <= _FEW.get(x.dtype, 0)
        if (rows is None) == (where is None) and not (few and generation(current, adapter) is not None):
            factors = _own_factors(hosts, layers, current, adapter)
            if fits(layers, factors, x.numel()):
                runs.append((where, weight, factors))
                continue
        left.append(part)
    if not runs:
        return [], left
    lasting = not torch.is_grad_enabled() and states(current, bank) is not None
    groups = [runs] if current.chart.apart else [[run] for run in runs]
    return [Native(layers, group, lasting=lasting) for group in groups], left


def _state(
    hosts: list[AdaptedForward], layers: list[Layer], current: Pass, adapters: list[Adapter]
) -> tuple[object, ...] | None:
    """What tells one state of frozen adapters at these layers from another; None where something is trained, or drops out."""
    if torch.is_grad_enabled() or any(hosts[0].dropout(current, adapter) for adapter in adapters):
        return None
    numbers = [generation(current, adapter) for adapter in adapters]
    return None if None in numbers else (*numbers, *_marks(layers))


def _own_factors(
    hosts: list[AdaptedForward], layers: list[Layer], current: Pass, adapter: Adapter
) -> list[Factors | None]:
    """An adapter's factors at the layers of a call; those of a frozen one are folded, and kept."""
    state = _state(hosts, layers, current, [adapter])

    def made() -> list[Factors | None]:
        own = [_factors(each, current, adapter) for each in hosts]
        if state is not None:
            for f, (weight, _) in zip(own, layers, strict=True):
                if f is not None:
                    f.folded = f.fold(weight.dtype)
        return own

    return made() if state is None else keep(hosts[0].bank, hosts[0].site.name, (adapter.name,), state, made)


def _branches(
    hosts: list[AdaptedForward], layers: list[Layer], current: Pass, group: list[Part], grid: Grid | None, number: int
) -> list[Branch]:
    """Parts as branches of a call: one for a bundle, else one each. Of frozen adapters all that can be kept is."""
    bank = hosts[0].bank
    adapters = [bank[name] for name, _, _ in group]
    if grid is not None:
        state = _state(hosts, layers, current, adapters)

        def every() -> list[list[Factors | None]]:
            return [[_factors(each, current, adapter) for each in hosts] for adapter in adapters]

        if state is None:
            own = every()
            return [Bundle(grid, own, stack(own, layers, grid))]
        names, site = tuple(adapter.name for adapter in adapters), hosts[0].site.name
        kept = keep(bank, site, names, (*state, grid.few), lambda: stack(every(), layers, grid), number)
        return [Bundle(grid, None, kept)]
    branches: list[Branch] = []
    for adapter, (_, rows, weight) in zip(adapters, group, strict=True):
        where = None if rows is None else current.chart.spans.get(id(rows), rows)
        branches.append(Share(where, weight, _own_factors(hosts, layers, current, adapter)))
    return branches


def _mark(x: Tensor, current: Pass) -> tuple[int, ...]:
    """What must be the same for an output that is ready to be taken. Ids hold while the input and the pass are kept alive."""
    return id(x), -1 if x.is_inference() else x._version, id(current), torch.is_grad_enabled()


def _layer(host: AdaptedForward) -> Layer:
    module: Any = host.site.module
    return module.weight.T if host.site.kind == "conv1d" else module.weight, module.bias


def _fits(host: AdaptedForward, x: Tensor) -> bool:
    """Whether a layer is a plain frozen linear one, or transformers' Conv1D, as it stands there now."""
    turned = host.site.kind == "conv1d"
    if host.inner is not None or not (turned or type(host.site.module).forward is nn.Linear.forward):
        return False
    weight, bias = _layer(host)
    if weight.is_contiguous() == turned and min(weight.shape) > 1:
        return False
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return (
        frozen
        and type(weight) in _PLAIN
        and type(x) in _PLAIN
        and weight.dtype == x.dtype
        and weight.is_floating_point()
        and weight.layout == torch.strided
        and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _can(host: AdaptedForward, current: Pass, part: Part) -> bool:
    """Whether the fast form knows what this adapter does here."""
    name, _, weight = part
    if host.site.name not in host.bank[name].tensors:
        return False
    key = (name, id(weight))
    support = current.chart.plans.get(key)
    if support is None:
        method = host.bank[name].method
        support = current.chart.plans[key] = method.fast_support(weight, exclusive=current.chart.apart)
    # The output is kept for the gradient of a magnitude, so the model must not write over it.
    kept = not (host.site.overwritten and torch.is_grad_enabled())
    return support == "always" or (support == "unless_overwritten" and kept)


def _siblings(host: AdaptedForward, current: Pass, parts: list[Part], x: Tensor) -> list[AdaptedForward]:
    """The hosts that will be called next with the same input, and may share this call."""
    group = host.site.group
    if not group or group[0] != host.site.name:
        return []
    found = []
    for name in group[1:]:
        other = host.bank.wiring.host(host.bank.sites[name])
        if other is not None and _fits(other, x):
            there = [part for part in parts if name in host.bank[part[0]].tensors]
            if there and all(_can(other, current, part) for part in there):
                found.append(other)
    return found


def _factors(host: AdaptedForward, current: Pass, adapter: Adapter) -> Factors | None:
    own = adapter.tensors.get(host.site.name)
    if own is None:
        return None
    names = adapter.method.factor_names(host.site.kind)
    return Factors(
        own[names[0]],
        own[names[1]],
        adapter.scale(host.site.name),
        adapter.method.magnitude(own),
        host.norm(current, adapter),
        host.dropout(current, adapter),
    )
