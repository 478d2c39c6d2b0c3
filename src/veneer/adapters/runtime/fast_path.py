"""The fast path: layers that one kernel call computes, adapters included.

The fast form (``kernels/lora/linear.py``) takes plain frozen linear layers (and Conv1D, and `QuantizedLinear`) with LoRA of any kind,
and with DoRA whose norm is constant. Everything else takes the plain path: other layer kinds, layers with a forward of their own (those
of bitsandbytes too), weights that are trained, autocast, DoRA in a weighted mix or where the model writes over the output, PEFT's form
of DoRA dropout, tied heads.

Layers that the dry run saw reading the same input one after the other (q, k, v; gate, up) are computed when the first of them is called;
the others take their `SharedOutputs` if they are given the same tensor, unchanged. Hooks on each layer run as always, and a layer that
is given another input computes for itself.

Where nothing is trained, a layer's whole call (the layers that share it, its branches) is kept with the route's plan and reused while
the adapters, the weights and the shapes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.runtime.forward_pass import ForwardPass, SharedOutputs
from veneer.adapters.runtime.grouping import groups_of
from veneer.adapters.runtime.layer import AdaptedLayer
from veneer.adapters.runtime.plan import Assignment
from veneer.kernels.lora.linear import (
    AdapterSpan,
    Branch,
    Factors,
    GroupedBranch,
    Layer,
    NativeBranch,
    SingleBranch,
    StoredLayer,
    TokenGrid,
    adapted_linear,
    fits,
    opened,
    outlined,
    pad_factors,
)
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.kernels.versions import mark_of, version_of

_PLAIN = (Tensor, nn.Parameter)
_FEW = {torch.float32: 64}
"""Largest number of tokens of a frozen adapter that kept factors compute faster than C++ (docs/log/mixed_batches.md)."""


@dataclass(frozen=True, eq=False)
class CallWeights:
    """The base weights of one call: as modules hold them, dense, and as branches may keep them. All are one where nothing is quantized."""

    stored: Sequence[StoredLayer]
    dense: Sequence[Layer]
    lasting: Sequence[Layer]

    @classmethod
    def of(cls, members: list[AdaptedLayer], dtype: torch.dtype) -> CallWeights:
        """Of the layers of a call; what is quantized is dequantized now."""
        stored = [_weights(each) for each in members]
        dense = opened(stored, dtype)
        return cls(stored, dense, outlined(stored, dense))

    @property
    def marks(self) -> tuple[object, ...]:
        """Keys that change when a weight or a bias does."""
        return _marks(self.stored)


@dataclass(frozen=True, eq=False)
class LayerCall:
    """A layer's call where nothing is trained.

    Attributes:
        layers: the adapted layers that share the call.
        branches: what the kernel takes.
        versions, weights: versions of the adapters, marks of the base weights.
        batch_shape: the input's leading sizes, None where the branches do not depend on them.
        drops: whether an adapter would drop out in training.
    """

    layers: list[AdaptedLayer]
    branches: list[Branch]
    versions: tuple[int, ...]
    weights: tuple[object, ...]
    batch_shape: tuple[int, ...] | None
    dtype: torch.dtype
    drops: bool


def fast_forward(layer: AdaptedLayer, current: ForwardPass, assignments: list[Assignment], x: Tensor) -> Tensor | None:
    """The layer's output with its adapters, or None where the plain path must compute it."""
    if not _fits(layer, x) or not all(_supports(layer, one) for one in assignments):
        return None
    found = _shared_output(layer, current, x)
    if found is not None:
        return found
    members = [layer, *_siblings(layer, current, assignments, x)]
    weights = CallWeights.of(members, x.dtype)
    branches, left = _native(members, weights, current, assignments, x)
    for number, (group, grid) in enumerate(groups_of(layer, current.plan, left) if left else ()):
        branches += _branches(members, weights, current, group, grid, number)
    _remember(members, current, x, branches, weights.marks)
    return _run(members, weights.stored, branches, current, x, weights.dense)


def reuse_call(layer: AdaptedLayer, current: ForwardPass, x: Tensor) -> Tensor | None:
    """The layer's output by an earlier call that differed only in the input's values, or None where there is none.

    It saves a decoding step the search for what it will compute.
    """
    if not _fits(layer, x):
        return None
    found = _shared_output(layer, current, x)
    if found is not None:
        return found
    call: LayerCall | None = current.plan.calls.get(layer.site.name)
    if call is None or torch.is_grad_enabled() or call.dtype != x.dtype:
        return None
    if call.batch_shape is not None and call.batch_shape != x.shape[:-1]:
        return None
    if call.drops and layer.training(current):
        return None
    if layer.runtime.frozen.all_frozen(current) != call.versions or not all(_fits(each, x) for each in call.layers[1:]):
        return None
    weights = [_weights(each) for each in call.layers]
    return _run(call.layers, weights, call.branches, current, x) if _marks(weights) == call.weights else None


def _remember(
    layers: list[AdaptedLayer], current: ForwardPass, x: Tensor, branches: list[Branch], weights: tuple[object, ...]
) -> None:
    """Keep a call for the next steps, if all its adapters are frozen."""
    plan, layer = current.plan, layers[0]
    if torch.is_grad_enabled() or not current.lasting or plan.has_overrides:
        return
    versions = layer.runtime.frozen.all_frozen(current)
    if versions is None or (plan.drops and layer.training(current)):
        return
    batch_shape = None if plan.uniform is not None else tuple(x.shape[:-1])
    plan.calls[layer.site.name] = LayerCall(layers, branches, versions, weights, batch_shape, x.dtype, plan.drops)


def _shared_output(layer: AdaptedLayer, current: ForwardPass, x: Tensor) -> Tensor | None:
    """The output, where a layer that reads the same input has computed it."""
    state = layer.runtime.tracker.state
    shared, state.shared = state.shared, None
    if shared is None or shared.key != _input_key(x, current) or layer.site.name not in shared.outputs:
        return None
    state.shared = shared
    return shared.outputs.pop(layer.site.name)


def _run(
    members: list[AdaptedLayer],
    weights: Sequence[StoredLayer],
    branches: list[Branch],
    current: ForwardPass,
    x: Tensor,
    dense: Sequence[Layer] | None = None,
) -> Tensor:
    first, *others = adapted_linear(x, weights, branches, dense)
    if others:
        names = [each.site.name for each in members[1:]]
        outputs = dict(zip(names, others, strict=True))
        members[0].runtime.tracker.state.shared = SharedOutputs(x, current, _input_key(x, current), outputs)
    return first


def _input_key(x: Tensor, current: ForwardPass) -> tuple[int, ...]:
    """Key of a shared output. Ids stay unique while the input and the pass are kept alive."""
    return id(x), version_of(x), id(current), torch.is_grad_enabled()


def _marks(weights: Sequence[StoredLayer]) -> tuple[object, ...]:
    """Keys that change when a weight or a bias does."""
    return tuple(
        (w.mark if isinstance(w, QuantizedWeight) else mark_of(w), None if b is None else mark_of(b))
        for w, b in weights
    )


def _weights(layer: AdaptedLayer) -> StoredLayer:
    module: Any = layer.site.module
    if type(module) is QuantizedLinear:
        return module.quantized, module.bias
    return module.weight.T if layer.site.kind == "conv1d" else module.weight, module.bias


def _native(
    members: list[AdaptedLayer], weights: CallWeights, current: ForwardPass, assignments: list[Assignment], x: Tensor
) -> tuple[list[Branch], list[Assignment]]:
    """The adapters that kernels in C++ can take, in one branch if they share no token, and the assignments that are left."""
    if not fits(weights.dense):
        return [], assignments
    frozen = members[0].runtime.frozen
    trains = torch.is_grad_enabled()
    tokens = x.numel() // max(1, x.shape[-1])
    spans: list[AdapterSpan] = []
    left: list[Assignment] = []
    for one in assignments:
        few = not trains and (tokens if one.tokens is None else len(one.tokens)) <= _FEW.get(x.dtype, 0)
        if (one.tokens is None) == (one.span is None) and not (
            few and frozen.versions(current)[one.adapter] is not None
        ):
            factors = _factors(members, weights, current, one.adapter)
            if fits(weights.dense, factors, x.numel()):
                spans.append(AdapterSpan(one.span, one.weight, factors))
                continue
        left.append(one)
    if not spans:
        return [], left
    lasting = not trains and frozen.all_frozen(current) is not None
    groups = [spans] if current.plan.exclusive else [[span] for span in spans]
    return [NativeBranch(weights.lasting, group, lasting=lasting) for group in groups], left


def _branches(
    members: list[AdaptedLayer],
    weights: CallWeights,
    current: ForwardPass,
    group: list[Assignment],
    grid: TokenGrid | None,
    number: int,
) -> list[Branch]:
    """One branch for a group on a grid, else one for each assignment."""
    if grid is None:
        return [
            SingleBranch(
                one.tokens if one.span is None else one.span,
                one.weight,
                _factors(members, weights, current, one.adapter),
            )
            for one in group
        ]
    names = tuple(one.adapter for one in group)
    version = _version(members, weights, current, names)

    def every() -> list[list[Factors | None]]:
        return [_made(members, weights, current, name) for name in names]

    if version is None:
        factors = every()
        return [GroupedBranch(grid, factors, pad_factors(factors, weights.dense, grid))]
    padded = members[0].runtime.frozen.keep(
        members[0].site.name, names, (*version, grid.few), lambda: pad_factors(every(), weights.dense, grid), number
    )
    return [GroupedBranch(grid, None, padded)]


def _version(
    members: list[AdaptedLayer], weights: CallWeights, current: ForwardPass, names: tuple[str, ...]
) -> tuple[object, ...] | None:
    """Version of frozen adapters at these layers; None if one is trained or drops out."""
    first = members[0]
    if torch.is_grad_enabled() or any(first.dropout(current, first.adapters[name].adapter) for name in names):
        return None
    versions = first.runtime.frozen.versions(current)
    numbers = [versions[name] for name in names]
    return None if None in numbers else (*numbers, *weights.marks)


def _factors(
    members: list[AdaptedLayer], weights: CallWeights, current: ForwardPass, name: str
) -> list[Factors | None]:
    """An adapter's factors at the layers of a call; those of a frozen one are prepared and kept."""
    version = _version(members, weights, current, (name,))
    if version is None:
        return _made(members, weights, current, name)

    def prepared() -> list[Factors | None]:
        made = _made(members, weights, current, name)
        for factors, (weight, _) in zip(made, weights.dense, strict=True):
            if factors is not None:
                factors.prepared = factors.prepare(weight.dtype)
        return made

    return members[0].runtime.frozen.keep(members[0].site.name, (name,), version, prepared)


def _made(members: list[AdaptedLayer], weights: CallWeights, current: ForwardPass, name: str) -> list[Factors | None]:
    return [_factors_at(each, current, name, w) for each, (w, _) in zip(members, weights.dense, strict=True)]


def _factors_at(layer: AdaptedLayer, current: ForwardPass, name: str, weight: Tensor) -> Factors | None:
    at = layer.adapters.get(name)
    if at is None or at.tensors is None or at.tied:
        return None
    norm = None if at.norms == "none" else layer.norm(current, at, weight)
    magnitude = None if norm is None else at.adapter.method.magnitude(at.tensors)
    return Factors(at.tensors[at.a], at.tensors[at.b], at.scale, magnitude, norm, layer.dropout(current, at.adapter))


def _fits(layer: AdaptedLayer, x: Tensor) -> bool:
    """True if a layer is now a plain frozen linear one, or transformers' Conv1D."""
    turned = layer.site.kind == "conv1d"
    if type(layer.site.module) is QuantizedLinear:
        return (
            layer.inner is None
            and _plain_call(x)
            and x.is_floating_point()
            and not layer.site.weight.is_floating_point()
        )
    if layer.inner is not None or not (turned or type(layer.site.module).forward is nn.Linear.forward):
        return False
    weight, bias = _weights(layer)
    assert not isinstance(weight, QuantizedWeight)
    if weight.is_contiguous() == turned and min(weight.shape) > 1:
        return False
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return (
        frozen
        and type(weight) in _PLAIN
        and _plain_call(x)
        and weight.dtype == x.dtype
        and weight.is_floating_point()
        and weight.layout == torch.strided
    )


def _plain_call(x: Tensor) -> bool:
    """True for a plain tensor outside of autocast and of functorch's transforms."""
    return (
        type(x) in _PLAIN
        and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _supports(layer: AdaptedLayer, one: Assignment) -> bool:
    """True if the fast path supports this adapter at this layer."""
    at = layer.adapters[one.adapter]
    if at.tensors is None or at.tied:
        return False
    # The output is kept for the gradient of a magnitude, so the model must not write over it.
    unchanged = not (layer.site.overwritten and torch.is_grad_enabled())
    return one.fast == "always" or (one.fast == "unless_overwritten" and unchanged)


def _siblings(
    layer: AdaptedLayer, current: ForwardPass, assignments: list[Assignment], x: Tensor
) -> list[AdaptedLayer]:
    """The layers that will be called next with the same input and may share this call: no other adapters act there."""
    group = layer.site.group
    if not group or group[0] != layer.site.name:
        return []
    found = []
    names = {one.adapter for one in assignments}
    for name in group[1:]:
        other: AdaptedLayer | None = layer.runtime.layers.get(name)
        if other is not None and _fits(other, x):
            if any(
                one in other.adapters and other.adapters[one].tensors for one in current.plan.adapters.keys() - names
            ):
                continue
            here = [
                one
                for one in assignments
                if (at := other.adapters.get(one.adapter)) is not None and at.tensors is not None
            ]
            if here and all(_supports(other, one) for one in here):
                found.append(other)
    return found
