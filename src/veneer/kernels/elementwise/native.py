"""The elementwise chains in C++ (``cpp/elementwise.cpp``): the forms of `elementwise` for fp32 and bf16 on a CPU.

A step calls them a few hundred times for some ten microseconds of work each, so a call must cost little: no guards as compiled graphs
have them, and numbers handed over as they are. Arguments and results are those of the plain functions; None says that this form does not
take such inputs, and another one has to.

Shapes: T tokens, D width, H heads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.cpp_library import KINDS, function

__all__ = ["gated_backward", "gated_forward", "norm_backward", "norm_forward", "rotate", "rotate_back"]

_LANES = 16
_ALONE = 2**14
"""Up to so many elements one thread is as quick as several."""
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "veneer_norm": (_INT, _INT, *[_POINTER] * 4, _LONG, _LONG, _FLOAT, _INT),
    "veneer_gated": (_INT, _INT, *[_POINTER] * 5, _LONG, _INT),
    "veneer_rotate": (_INT, *[_POINTER] * 6, *[_LONG] * 4, _FLOAT, _INT),
}


def norm_forward(made: ctypes.CDLL, x_TD: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> Tensor | None:
    """RMSNorm of every row."""
    return _norm(made, None, x_TD, weight_D, eps, one_plus)


def norm_backward(
    made: ctypes.CDLL, g_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, one_plus: bool
) -> Tensor | None:
    """dx of RMSNorm."""
    return _norm(made, g_TD, x_TD, weight_D, eps, one_plus)


def _norm(
    made: ctypes.CDLL, g_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, eps: float, one_plus: bool
) -> Tensor | None:
    kind = _kind(x_TD, weight_D) if g_TD is None else _kind(x_TD, weight_D, g_TD)
    rows, width = x_TD.shape
    if kind is None or width % _LANES:
        return None
    x, weight = x_TD.contiguous(), weight_D.contiguous()
    g = None if g_TD is None else g_TD.contiguous()
    y = torch.empty_like(x)
    function(made, "veneer_norm", _ARGUMENTS["veneer_norm"])(
        kind,
        one_plus,
        None if g is None else g.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        rows,
        width,
        eps,
        _threads(y),
    )
    return y


def gated_forward(made: ctypes.CDLL, gate: Tensor, up: Tensor, activation: str) -> Tensor | None:
    """act(gate) * up."""
    kind = _kind(gate, up)
    if kind is None or gate.numel() % _LANES:
        return None
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    function(made, "veneer_gated", _ARGUMENTS["veneer_gated"])(
        kind,
        activation != "silu",
        None,
        gate.data_ptr(),
        up.data_ptr(),
        y.data_ptr(),
        None,
        y.numel(),
        _threads(y),
    )
    return y


def gated_backward(
    made: ctypes.CDLL, d: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor] | None:
    """(dgate, dup)."""
    kind = _kind(d, gate, up)
    if kind is None or gate.numel() % _LANES:
        return None
    d, gate, up = d.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    function(made, "veneer_gated", _ARGUMENTS["veneer_gated"])(
        kind,
        activation != "silu",
        d.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        d_gate.data_ptr(),
        d_up.data_ptr(),
        d.numel(),
        _threads(d),
    )
    return d_gate, d_up


def rotate(
    made: ctypes.CDLL, q_THD: Tensor, k_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor
) -> tuple[Tensor, Tensor] | None:
    """x cos + rotate_half(x) sin, of both."""
    return _turn(made, q_THD, k_TGD, cos_TD, sin_TD, 1.0)


def rotate_back(
    made: ctypes.CDLL, g_THD: Tensor, h_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The transpose of `rotate`."""
    return _turn(made, g_THD, h_TGD, cos_TD, sin_TD, -1.0)


def _turn(
    made: ctypes.CDLL, q_THD: Tensor, k_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: float
) -> tuple[Tensor, Tensor] | None:
    kind = _kind(q_THD, k_TGD, cos_TD, sin_TD)
    tokens, heads, width = q_THD.shape
    if kind is None or width % 2:
        return None
    q_THD, k_TGD, cos_TD, sin_TD = (x.contiguous() for x in (q_THD, k_TGD, cos_TD, sin_TD))
    q, k = torch.empty_like(q_THD), torch.empty_like(k_TGD)
    function(made, "veneer_rotate", _ARGUMENTS["veneer_rotate"])(
        kind,
        q_THD.data_ptr(),
        k_TGD.data_ptr(),
        cos_TD.data_ptr(),
        sin_TD.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        tokens,
        heads,
        k_TGD.shape[1],
        width,
        sign,
        _threads(q),
    )
    return q, k


def _kind(*tensors: Tensor) -> int | None:
    """The number of the dtype that all of them have, if they are on a CPU."""
    dtype = tensors[0].dtype
    for x in tensors:
        if x.dtype != dtype or not x.is_cpu:
            return None
    return KINDS.get(dtype)


def _threads(x: Tensor) -> int:
    return 1 if x.numel() <= _ALONE else torch.get_num_threads()
