"""Stacked experts: one module whose 3-D parameters hold the weights of all experts of a mixture.

    parameter        stored                                                parts
    gate_up_proj     [E, 2I, H], transposed [E, H, 2I]                     gate_proj, up_proj: halves, or every other output
    up_proj          [E, I, H], where experts have no gate                 up_proj
    down_proj        [E, H, I], transposed [E, I, H]                       down_proj
    *_bias           [E, out]

A site is one part of one expert, named as the experts' own files name it (``mlp.experts.7.gate_proj``). It is an ordinary linear layer
whose weight is a view into the stack (`ExpertLinear`), so methods, files, merging and measurements treat it as any other. The forward
belongs to the stack: ``runtime/experts.py`` computes it.

The layouts are those of transformers' ``use_experts_implementation``, whose attributes (``is_transposed``, ``is_concatenated``,
``has_bias``, ``has_gate``) are read from the module, and of Llama 4, which gives every expert every token.

Shapes: T tokens, k experts per token, S = T * k pairs of a token and an expert, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers.kinds import Geometry, LayerKind
from veneer.kernels.experts import Pairs, routed_experts
from veneer.kernels.quantized.stack import QuantizedStack
from veneer.kernels.quantized.weight import QuantizedWeight

_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
_FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")


@dataclass(frozen=True)
class Part:
    """One projection of every expert of a stack: outputs ``columns`` of the fused parameter ``parameter``."""

    name: str
    parameter: str
    columns: slice


Change = Callable[[Sequence[Part], Tensor, Tensor, Pairs], Tensor]
"""(parts of a fused parameter, its input [S, in], its output [S, out], pairs) -> the output with the adapters' changes."""


class ExpertsKind(LayerKind):
    """Operations on stacked experts that are given tokens with the indices and weights of their experts."""

    kind = "experts"

    def count(self, module: Any) -> int:
        """Number of experts."""
        return int(module.down_proj.shape[0])

    def transposed(self, module: Any) -> bool:
        """True if the weights are stored [in, out]."""
        return bool(module.is_transposed)

    def parts(self, module: Any) -> tuple[Part, ...]:
        """The projections of an expert, those of one fused parameter beside each other."""
        down = Part("down_proj", "down_proj", slice(None))
        if not module.has_gate:
            return Part("up_proj", "up_proj", slice(None)), down
        size = module.gate_up_proj.shape[2 if self.transposed(module) else 1] // 2
        halves = (slice(0, size), slice(size, 2 * size))
        gate, up = halves if module.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        return Part("gate_proj", "gate_up_proj", gate), Part("up_proj", "gate_up_proj", up), down

    def fused(self, module: Any, parameter: str, expert: int) -> Tensor:
        """The fused weight of one expert as a view [out, in]."""
        weight: Tensor = getattr(module, parameter)[expert]
        return weight.T if self.transposed(module) else weight

    def fused_bias(self, module: Any, parameter: str) -> Tensor | None:
        """The bias of a fused parameter [E, out], or None."""
        bias: Tensor | None = getattr(module, f"{parameter}_bias") if module.has_bias else None
        return bias

    def geometry(self, module: Any) -> Geometry:
        _, *sizes = module.down_proj.shape
        out, in_ = reversed(sizes) if self.transposed(module) else sizes
        return Geometry(self.kind, out, in_)

    def batch_shape(self, module: Any, x: Tensor) -> tuple[int, ...]:
        return (x.shape[:-1].numel(),)

    def forward(self, module: Any, change: Change, x: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        """The module's own computation with ``change`` applied to the output of each fused parameter.

        It takes the steps of the implementation that the model is set to (``grouped_mm``, or one expert after the other), so that
        tokens without a change keep the bits of the module's own call.
        """
        *first, down = self.parts(module)

        def changed(parameter: str, x_SK: Tensor, y_SO: Tensor, pairs: Pairs) -> Tensor:
            return change([down] if parameter == down.parameter else first, x_SK, y_SO, pairs)

        return routed_experts(module, x, index_Tk, weight_Tk, grouped=_grouped(module), change=changed)


class DenseExpertsKind(ExpertsKind):
    """Llama 4's experts: the input holds every token once per expert [E * T, H], scaled by its routing weight, zero if not routed."""

    def transposed(self, module: Any) -> bool:
        return True

    def parts(self, module: Any) -> tuple[Part, ...]:
        size = module.gate_up_proj.shape[2] // 2
        gate, up = slice(0, size), slice(size, 2 * size)
        down = Part("down_proj", "down_proj", slice(None))
        return Part("gate_proj", "gate_up_proj", gate), Part("up_proj", "gate_up_proj", up), down

    def fused_bias(self, module: Any, parameter: str) -> Tensor | None:
        return None

    def batch_shape(self, module: Any, x: Tensor) -> tuple[int, ...]:
        return (x.shape[0] // self.count(module),)

    def by_token(self, module: Any, x: Tensor) -> Tensor:
        return x.view(self.count(module), -1, x.shape[-1]).transpose(0, 1)

    def forward(self, module: Any, change: Change, x: Tensor, *routing: Tensor) -> Tensor:
        count = self.count(module)
        tokens = x.shape[0] // count
        row = torch.arange(x.shape[0], device=x.device)
        # Every expert has every token; a change is linear in its input, so rows of zeros need none.
        routed = (x != 0).any(1)
        pairs = Pairs(torch.where(routed, row % tokens, -1), row // tokens, (tokens,) * count, tokens)
        gate_up, up, down = self.parts(module)
        x_ETH = x.view(count, tokens, -1)
        y = change([gate_up, up], x, torch.bmm(x_ETH, module.gate_up_proj).flatten(0, 1), pairs)
        gate, up_SI = y.chunk(2, dim=-1)
        hidden_SI = up_SI * module.act_fn(gate)
        y = torch.bmm(hidden_SI.view(count, tokens, -1), module.down_proj).flatten(0, 1)
        return change([down], hidden_SI, y, pairs).view(-1, x.shape[-1])


class ExpertLinear(nn.Module):
    """One part of one expert as a linear layer whose weight and bias are views into the stack. It is not part of the model."""

    def __init__(self, stack: nn.Module, kind: ExpertsKind, expert: int, part: Part) -> None:
        super().__init__()
        self.__dict__.update(stack=stack, kind=kind)
        self.expert = expert
        self.part = part

    @property
    def training(self) -> bool:
        """The mode of the stack: this layer is not part of the model, so nothing else switches it."""
        return bool(self.__dict__["stack"].training) if "stack" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None: ...

    def view_of(self, fused: Tensor | QuantizedStack) -> Tensor:
        """The weight [out, in] of this part in a stack of the shape of its parameter; a copy where the stack is quantized."""
        stack: Any = self.__dict__["stack"]
        weight = fused[self.expert]
        return (weight.T if self.__dict__["kind"].transposed(stack) else weight)[self.part.columns]

    @property
    def weight(self) -> Tensor:
        """The weight [out, in]; of a quantized stack, the packed numbers of all experts. Its shape and dtype alone where processes hold
        parts of the stack, which indexing would exchange."""
        held = self._held
        if isinstance(held, QuantizedStack):
            return held.weight
        divided = hasattr(held, "full_tensor")
        return self.view_of(torch.empty(held.shape, dtype=held.dtype, device="meta") if divided else held)

    @property
    def dense(self) -> Tensor:
        """The weight [out, in]; of a quantized stack a new tensor, which must not be kept."""
        return self.view_of(self._held)

    @property
    def quantized(self) -> QuantizedWeight | None:
        """The quantized weight of the whole stack, or None for a dense one."""
        held = self._held
        return held.quantized if isinstance(held, QuantizedStack) else None

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the weight is computed with."""
        dtype: torch.dtype = self._held.dtype
        return dtype

    @property
    def _held(self) -> Any:
        return getattr(self.__dict__["stack"], self.part.parameter)

    @property
    def bias(self) -> Tensor | None:
        """The bias [out], or None."""
        bias: Tensor | None = self.__dict__["kind"].fused_bias(self.__dict__["stack"], self.part.parameter)
        return None if bias is None else bias[self.expert][self.part.columns]

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return len(range(self._sizes[0])[self.part.columns])

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self._sizes[1]

    @property
    def _sizes(self) -> tuple[int, int]:
        """(outputs, inputs) of the fused parameter."""
        _, rows, columns = self._held.shape
        return (columns, rows) if self.__dict__["kind"].transposed(self.__dict__["stack"]) else (rows, columns)


class QuantizedExpertKind(LayerKind):
    """A part of one expert of a quantized stack, as a linear layer."""

    def weight_2d(self, module: Any) -> Tensor:
        return self.dense(module)

    def dense(self, module: Any) -> Tensor:
        dense: Tensor = module.dense
        return dense

    def quantized(self, module: Any) -> QuantizedWeight | None:
        weight: QuantizedWeight | None = module.quantized
        return weight

    def dtype(self, module: Any) -> torch.dtype:
        dtype: torch.dtype = module.dtype
        return dtype


_ROUTED, _DENSE = ExpertsKind(), DenseExpertsKind()


def experts_kind_for(module: nn.Module) -> tuple[ExpertsKind | None, str]:
    """The kind of a module of stacked experts, or None with the reason why its experts cannot be adapted (empty: no stacked experts)."""
    known: Any = module
    if isinstance(getattr(module, "down_proj", None), QuantizedStack):
        return _ROUTED, ""
    if "down_proj" not in module._parameters:
        return None, ""
    stacked = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    if len(stacked) < 2:
        return None, ""
    if not all(p.is_floating_point() for p in stacked):
        return None, f"its experts are stored as {stacked[0].dtype}, which is not supported"
    if all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        if getattr(module, "_is_expert_parallel", False):
            return None, "its experts are spread over several processes, which is not supported"
        first = "gate_up_proj" if known.has_gate else "up_proj"
        return (_ROUTED, "") if first in module._parameters else (None, "")
    if type(module).__name__ == "Llama4TextExperts" and "gate_up_proj" in module._parameters:
        return _DENSE, ""
    return None, ""


def active_experts(module: nn.Module, model: nn.Module) -> int:
    """Number of experts that compute a token, by the configuration of the module or of the model; 1 where it does not say."""
    for owner in (module, model):
        config: Any = getattr(owner, "config", None)
        text = getattr(config, "get_text_config", None)
        for source in (config, text() if callable(text) else None):
            for name in _ACTIVE:
                value = getattr(source, name, None)
                if type(value) is int and value > 0:
                    return value
    return 1


def _grouped(module: Any) -> bool:
    """True if the model is set to compute its experts with ``grouped_mm``."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None) == "grouped_mm"
