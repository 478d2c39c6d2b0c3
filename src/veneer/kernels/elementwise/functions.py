"""The elementwise chains of a transformer's block, with backward passes by hand: RMSNorm, gated activations, rotary embedding.

    rms_norm    y = x / rms(x) * w                     dx = (g w - n mean(g w n)) / rms(x),   n = x / rms(x)
    gated       y = act(gate) * up                     dgate = d up act'(gate),   dup = d act(gate)
    rotary      y = x cos + rotate_half(x) sin         dx = the same with -sin

Written out in a model these are some ten passes over memory each, with most of their intermediate results kept for backward. Here the
inputs alone are kept, and each direction is a chain (`compiled`): one pass, where a compiler is there. Norms and rotations compute in
fp32 (fp64 for fp64) and round where the models round: Llama's norm before it multiplies by w, Gemma's after, with 1 + w.

Weights of norms are constants here: a norm that is trained keeps its own forward. Shapes: T tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.elementwise import native as elementwise_native
from veneer.kernels.elementwise.compiled import Chain

__all__ = ["ACTIVATIONS", "gated", "rms_norm", "rotary"]

ACTIVATIONS = ("silu", "gelu_tanh")


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, one_plus: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, for x [..., D]; ``one_plus``: Gemma's form, * (1 + weight)."""
    apply: Any = _Norm.apply if torch.is_grad_enabled() else _normed
    return apply(x, weight_D.detach(), eps, one_plus)  # type: ignore[no-any-return]


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, elementwise; ``activation``: one of ACTIVATIONS."""
    apply: Any = _Gated.apply if torch.is_grad_enabled() else _gate
    return apply(gate, up, activation)  # type: ignore[no-any-return]


def rotary(q_THD: Tensor, k_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + rotate_half(x) sin of queries and keys; the halves of D are the two coordinates that are turned."""
    apply: Any = _Rotary.apply if torch.is_grad_enabled() else _rotate
    return apply(q_THD, k_TGD, cos_TD, sin_TD)  # type: ignore[no-any-return]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def norm_forward(x_TD: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> Tensor:
    """RMSNorm in one expression: what is compiled."""
    x = _wide(x_TD)
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (n * (1 + _wide(weight_D))).to(x_TD.dtype) if one_plus else n.to(x_TD.dtype) * weight_D


def norm_backward(g_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> Tensor:
    """dx of RMSNorm."""
    x = _wide(x_TD)
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    n = x * r
    gw = _wide(g_TD) * (1 + _wide(weight_D) if one_plus else _wide(weight_D))
    return ((gw - n * (gw * n).mean(-1, keepdim=True)) * r).to(x_TD.dtype)


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


def gated_backward(d: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(d * up, gate), d * F.silu(gate)
    return (
        torch.ops.aten.gelu_backward(d * up, gate, approximate="tanh"),
        d * F.gelu(gate, approximate="tanh"),
    )


def gated_backward_text(d: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`gated_backward` for the compiler: with one exponential an element where that is possible, and nothing rounded in between."""
    if activation != "silu":
        return gated_backward(d, gate, up, activation)
    d, g, u = _wide(d), _wide(gate), _wide(up)
    s = torch.sigmoid(g)
    act = g * s
    return (d * u * (s + act * (1 - s))).to(gate.dtype), (d * act).to(up.dtype)


def _turn(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: int) -> Tensor:
    """The rotation (sign 1) or its transpose (-1), for which the halves of sin change places too."""
    half = x_THD.shape[-1] // 2
    a, b = _wide(x_THD[..., :half]), _wide(x_THD[..., half:])
    cos, sin = _wide(cos_TD[:, None]), _wide(sin_TD[:, None])
    first, second = (sin[..., :half], sin[..., half:])[::sign]
    turned = (a * cos[..., :half] - sign * b * first, b * cos[..., half:] + sign * a * second)
    return torch.cat(turned, -1).to(x_THD.dtype)


def rotate(q_THD: Tensor, k_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + rotate_half(x) sin, of both."""
    return _turn(q_THD, cos_TD, sin_TD, 1), _turn(k_TGD, cos_TD, sin_TD, 1)


def rotate_back(g_THD: Tensor, h_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of `rotate`."""
    return _turn(g_THD, cos_TD, sin_TD, -1), _turn(h_TGD, cos_TD, sin_TD, -1)


_norm_forward = Chain(norm_forward, 1, native=elementwise_native.norm_forward)
_norm_backward = Chain(norm_backward, 2, native=elementwise_native.norm_backward)
_gated_forward = Chain(gated_forward, 2, native=elementwise_native.gated_forward)
_gated_backward = Chain(gated_backward, 3, gated_backward_text, elementwise_native.gated_backward)
_rotate = Chain(rotate, 4, native=elementwise_native.rotate)
_rotate_back = Chain(rotate_back, 4, native=elementwise_native.rotate_back)


def _normed(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
    y: Tensor = _norm_forward(x.reshape(-1, x.shape[-1]), weight, eps, one_plus)
    return y.view(x.shape)


def _gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    width = gate.shape[-1]
    y: Tensor = _gated_forward(gate.reshape(-1, width), up.reshape(-1, width), activation)
    return y.view(gate.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.one_plus = eps, one_plus
        return _normed(x, weight, eps, one_plus)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        width = x.shape[-1]
        dx = _norm_backward(g.reshape(-1, width), x.reshape(-1, width), weight, ctx.eps, ctx.one_plus)
        return dx.view(x.shape), None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gate(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        width = gate.shape[-1]
        dgate, dup = _gated_backward(*(t.reshape(-1, width) for t in (d, gate, up)), ctx.activation)
        return dgate.view(gate.shape), dup.view(gate.shape), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return (*_rotate_back(g, h, cos, sin), None, None)
