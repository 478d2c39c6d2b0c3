"""The elementwise functions in C++ (``cpp/elementwise.cpp``), for fp32 and bf16 on a CPU.

A training step makes a few hundred of these calls for about ten microseconds of work each, so a call must cost little. Each
function returns None where the kernels are not in use or do not accept the inputs.

Shapes: T tokens, D width, H heads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from veneer.kernels.cpp_library import KINDS, function, library
from veneer.kernels.tuning import ONE_THREAD_NUMBERS

__all__ = ["gated_backward", "gated_forward", "norm", "rotate"]

_LANES = 16
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p
_NORM = (_INT, _INT, *[_POINTER] * 4, _LONG, _LONG, _FLOAT, _INT)
_GATED = (_INT, _INT, *[_POINTER] * 5, _LONG, _INT)
_ROTATE = (_INT, *[_POINTER] * 6, *[_LONG] * 4, _FLOAT, _INT)


def norm(g_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> Tensor | None:
    """RMSNorm of every row, or its gradient with respect to x where ``g_TD`` is given."""
    made = library()
    if made is None:
        return None
    kind = _kind(x_TD, weight_D) if g_TD is None else _kind(x_TD, weight_D, g_TD)
    rows, width = x_TD.shape
    if kind is None or width % _LANES:
        return None
    x, weight = x_TD.contiguous(), weight_D.contiguous()
    g = None if g_TD is None else g_TD.contiguous()
    y = torch.empty_like(x)
    addresses = (None if g is None else g.data_ptr(), x.data_ptr(), weight.data_ptr(), y.data_ptr())
    function(made, "veneer_norm", _NORM)(kind, one_plus, *addresses, rows, width, eps, _threads(y))
    return y


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor | None:
    """act(gate) * up."""
    made = library()
    if made is None or (kind := _kind(gate, up)) is None or gate.numel() % _LANES:
        return None
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    addresses = (None, gate.data_ptr(), up.data_ptr(), y.data_ptr(), None)
    function(made, "veneer_gated", _GATED)(kind, activation != "silu", *addresses, y.numel(), _threads(y))
    return y


def gated_backward(d: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor] | None:
    """Gradients (dgate, dup) of act(gate) * up."""
    made = library()
    if made is None or (kind := _kind(d, gate, up)) is None or gate.numel() % _LANES:
        return None
    d, gate, up = d.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    addresses = (t.data_ptr() for t in (d, gate, up, d_gate, d_up))
    function(made, "veneer_gated", _GATED)(kind, activation != "silu", *addresses, d.numel(), _threads(d))
    return d_gate, d_up


def rotate(q_THD: Tensor, k_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: int) -> tuple[Tensor, Tensor] | None:
    """x cos + rotate_half(x) sin of queries and keys (``sign`` 1), or its transpose (-1)."""
    made = library()
    if made is None or (kind := _kind(q_THD, k_TGD, cos_TD, sin_TD)) is None or q_THD.shape[-1] % 2:
        return None
    q_THD, k_TGD, cos_TD, sin_TD = (t.contiguous() for t in (q_THD, k_TGD, cos_TD, sin_TD))
    q, k = torch.empty_like(q_THD), torch.empty_like(k_TGD)
    tokens, heads, width = q_THD.shape
    addresses = (t.data_ptr() for t in (q_THD, k_TGD, cos_TD, sin_TD, q, k))
    sizes = (tokens, heads, k_TGD.shape[1], width)
    function(made, "veneer_rotate", _ROTATE)(kind, *addresses, *sizes, sign, _threads(q))
    return q, k


def _kind(*tensors: Tensor) -> int | None:
    """Number of the dtype that all tensors share; None unless they are on a CPU."""
    dtype = tensors[0].dtype
    for x in tensors:
        if x.dtype != dtype or not x.is_cpu:
            return None
    return KINDS.get(dtype)


def _threads(x: Tensor) -> int:
    return 1 if x.numel() <= ONE_THREAD_NUMBERS else torch.get_num_threads()
