"""RMSNorm, gated activations and rotary embedding, with backward passes written by hand.

    rms_norm    y = x / rms(x) * w                     dx = (g w - n mean(g w n)) / rms(x),   n = x / rms(x)
    gated       y = act(gate) * up                     dgate = d up act'(gate),   dup = d act(gate)
    rotary      y = x cos + rotate_half(x) sin         dx = the same with -sin

Autograd would make about ten passes over memory for each of these and keep most intermediate results. Here only the inputs are
kept. The functions below are the reference; on a CPU, ``elementwise/native.py`` replaces them by kernels in C++ where it accepts the
inputs, and on a GPU each is compiled where a run has chosen so (``kernels/forms.py``). Norms and rotations compute in fp32 (fp64 for
fp64) and round where the models round: Llama's norm before it multiplies by w, Gemma's after, with 1 + w.

Norm weights are constants here: a trained norm keeps its own forward. Shapes: T tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.elementwise import native
from veneer.kernels.forms import forms

__all__ = ["ACTIVATIONS", "BACKEND", "compiled", "gated", "rms_norm", "rotary"]

P = ParamSpec("P")
T = TypeVar("T")
BACKEND = "inductor"
"""The compiler of the form "compiled"."""

ACTIVATIONS = ("silu", "gelu_tanh")


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, one_plus: bool = False) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [..., D]; ``one_plus`` multiplies by (1 + weight)."""
    apply: Any = _Norm.apply if torch.is_grad_enabled() else _norm
    return apply(x, weight_D.detach(), eps, one_plus)  # type: ignore[no-any-return]


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute act(gate) * up elementwise; ``activation`` is one of ACTIVATIONS."""
    apply: Any = _Gated.apply if torch.is_grad_enabled() else _gated
    return apply(gate, up, activation)  # type: ignore[no-any-return]


def rotary(q_THD: Tensor, k_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Compute x cos + rotate_half(x) sin for queries and keys; the two halves of D are the coordinates that are rotated."""
    apply: Any = _Rotary.apply if torch.is_grad_enabled() else _rotate
    return apply(q_THD, k_TGD, cos_TD, sin_TD)  # type: ignore[no-any-return]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def norm_forward(x_TD: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> Tensor:
    """RMSNorm of every row."""
    x = _wide(x_TD)
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (n * (1 + _wide(weight_D))).to(x_TD.dtype) if one_plus else n.to(x_TD.dtype) * weight_D


def norm_backward(g_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> Tensor:
    """Gradient of RMSNorm with respect to x."""
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
    """Gradients (dgate, dup) of act(gate) * up."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(d * up, gate), d * F.silu(gate)
    return (
        torch.ops.aten.gelu_backward(d * up, gate, approximate="tanh"),
        d * F.gelu(gate, approximate="tanh"),
    )


def rotate(q_THD: Tensor, k_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (``sign`` 1), or apply the transpose of the rotation (-1)."""
    return _rotate_one(q_THD, cos_TD, sin_TD, sign), _rotate_one(k_TGD, cos_TD, sin_TD, sign)


def _rotate_one(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: int) -> Tensor:
    half = x_THD.shape[-1] // 2
    a, b = _wide(x_THD[..., :half]), _wide(x_THD[..., half:])
    cos, sin = _wide(cos_TD[:, None]), _wide(sin_TD[:, None])
    first, second = (sin[..., :half], sin[..., half:])[::sign]  # the transpose exchanges the halves of sin
    rotated = (a * cos[..., :half] - sign * b * first, b * cos[..., half:] + sign * a * second)
    return torch.cat(rotated, -1).to(x_THD.dtype)


def _form(function: Callable[P, T], like: Tensor) -> Callable[P, T]:
    """The function, or on a GPU its compiled form if that was chosen."""
    return function if like.is_cpu or forms().elementwise == "plain" else compiled(function)


@cache
def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """One kernel for the whole chain, for all sizes; compiled when it is first called."""
    return torch.compile(function, dynamic=True, backend=BACKEND)


def _norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool, g: Tensor | None = None) -> Tensor:
    """RMSNorm, or with ``g`` its gradient, by the fastest form that accepts the inputs."""
    rows = x.reshape(-1, x.shape[-1])
    grad = None if g is None else g.reshape(rows.shape)
    y = native.norm(grad, rows, weight, eps, one_plus)
    if y is None:
        args = (rows, weight, eps, one_plus)
        y = _form(norm_forward, x)(*args) if grad is None else _form(norm_backward, x)(grad, *args)
    return y.view(x.shape)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = native.gated_forward(gate, up, activation)
    return _form(gated_forward, gate)(gate, up, activation) if y is None else y


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
    return native.rotate(q, k, cos, sin, sign) or _form(rotate, q)(q, k, cos, sin, sign)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.one_plus = eps, one_plus
        return _norm(x, weight, eps, one_plus)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _norm(x, weight, ctx.eps, ctx.one_plus, g), None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        args = (d, gate, up, ctx.activation)
        grads = native.gated_backward(*args) or _form(gated_backward, d)(*args)
        return (*grads, None)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return (*_rotate(g, h, cos, sin, -1), None, None)
