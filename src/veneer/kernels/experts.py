"""Products of stacked experts, without adapters: pairs of a token and an expert, sorted by expert, and the sum for each token.

It takes modules in the layouts of transformers' ``use_experts_implementation``, whose attributes (``is_transposed``, ``has_bias``,
``has_gate``) are read from the module. Weights are frozen, and may be quantized (``quantized/stack.py``).

Shapes: T tokens, k experts per token, S = T * k pairs of a token and an expert, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.lora.by_group import stacked_linear, takes_grouped_mm
from veneer.kernels.quantized.stack import QuantizedStack

__all__ = ["Pairs", "quantized_experts", "routed_experts"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of a token and one of its experts, expert by expert.

    tokens: the token of each pair [S], -1 for a pair that needs no change. experts: its expert [S]. sizes: number of pairs of each
    expert [E]. total: number of tokens.
    """

    tokens: Tensor
    experts: Tensor
    sizes: tuple[int, ...]
    total: int


StackChange = Callable[[str, Tensor, Tensor, Pairs], Tensor]
"""(fused parameter, its input [S, in], its output [S, out], pairs) -> the output with the adapters' changes."""


def routed_experts(
    module: Any, x: Tensor, index_Tk: Tensor, weight_Tk: Tensor, *, grouped: bool, change: StackChange | None = None
) -> Tensor:
    """The output of a module of stacked experts, with ``change`` applied to the output of each fused parameter.

    Args:
        module: the experts.
        x: [..., H].
        index_Tk, weight_Tk: the experts of each token, and their weights.
        grouped: take the steps of ``grouped_mm``; otherwise those of one expert after the other. Tokens without a change keep the bits
            of the module's own call.
        change: what adapters do to the outputs.
    """
    x_TH = x.reshape(-1, x.shape[-1])
    tokens, k = index_Tk.shape
    count = int(module.down_proj.shape[0])
    expert_S, order = torch.sort(index_Tk.reshape(-1), stable=True)
    sizes = torch.bincount(expert_S, minlength=count)[:count].tolist()
    pairs = Pairs(order // k, expert_S, tuple(sizes), tokens)
    out_SH = _experts(module, x_TH[pairs.tokens], pairs, grouped, change)
    if getattr(module, "has_post_expert_norm", False):
        out_SH = module.post_expert_norm(out_SH)
    out_SH = out_SH * weight_Tk.reshape(-1)[order].unsqueeze(-1)
    if grouped:
        out_TH = out_SH[torch.argsort(order)].view(tokens, k, -1).sum(1)
    else:
        out_TH = torch.zeros_like(x_TH)
        routed = sum(sizes)
        for token_s, out_sH in zip(pairs.tokens[:routed].split(sizes), out_SH[:routed].split(sizes), strict=True):
            # One expert after the other: in bf16 every sum is rounded.
            out_TH.index_add_(0, token_s, out_sH.to(x.dtype))
    return out_TH.to(x.dtype).reshape(x.shape)


def quantized_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of experts whose weights are quantized, with the arguments of transformers' implementations."""
    return routed_experts(module, hidden_states, top_k_index, top_k_weights, grouped=False)


def _experts(module: Any, x_SH: Tensor, pairs: Pairs, grouped: bool, change: StackChange | None) -> Tensor:
    """[S, H]: each pair's token through its expert."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    y = _product(module, first, x_SH, pairs, grouped)
    y = y if change is None else change(first, x_SH, y, pairs)
    hidden_SI = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = _product(module, "down_proj", hidden_SI, pairs, grouped)
    return y if change is None else change("down_proj", hidden_SI, y, pairs)


def _product(module: Any, parameter: str, x_SK: Tensor, pairs: Pairs, grouped: bool) -> Tensor:
    """[S, out]: the product of a fused parameter, with its bias."""
    held, transposed = getattr(module, parameter), bool(module.is_transposed)
    if isinstance(held, QuantizedStack):
        y = stacked_linear(x_SK, pairs.sizes, lambda e: _transposed(held.expert(e, x_SK.dtype), transposed))
    else:
        weight_EOK = held.detach().transpose(1, 2) if transposed else held.detach()
        if grouped and takes_grouped_mm(x_SK, weight_EOK):
            ends = torch.tensor(pairs.sizes, device=x_SK.device).cumsum(0).to(torch.int32)
            y = F.grouped_mm(x_SK, weight_EOK.transpose(1, 2), offs=ends)
            if sum(pairs.sizes) < len(x_SK):
                # grouped_mm leaves rows past the last group as they are in memory.
                y = y.masked_fill((torch.arange(len(x_SK), device=y.device) >= ends[-1]).unsqueeze(1), 0.0)
        else:
            y = stacked_linear(x_SK, pairs.sizes, weight_EOK)
    bias: Tensor | None = getattr(module, f"{parameter}_bias") if module.has_bias else None
    return y if bias is None else y + bias.detach()[pairs.experts.clamp_max(len(pairs.sizes) - 1)]


def _transposed(weight: Tensor, transposed: bool) -> Tensor:
    return weight.T if transposed else weight
