"""The elementwise chains in C++: values and gradients are the definition's, and inputs that they do not take go the plain way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.test_elementwise import check, draw, norm_reference, rotary_reference
from torch import Tensor

from veneer.kernels.cpp_library import library
from veneer.kernels.elementwise import native
from veneer.kernels.elementwise.functions import gated, gated_forward, norm_forward, rms_norm, rotary

pytestmark = pytest.mark.usefixtures("native_kernels")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ACT = {"silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of the library that are called, and found to take their inputs."""
    called: list[str] = []
    inner = native.function

    def function(made: Any, name: str, arguments: Any) -> Callable[..., Any]:
        called.append(name)
        return inner(made, name, arguments)

    monkeypatch.setattr(native, "function", function)
    return called


@DTYPES
@pytest.mark.parametrize("one_plus", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", [(3, 32), (1, 200, 48), (2, 3, 5, 16), (70, 576)], ids=str)
def test_norm(dtype: torch.dtype, one_plus: bool, shape: tuple[int, ...], calls: list[str]) -> None:
    """RMSNorm in both forms, any leading sizes, rows for one thread and for several."""
    x, weight = draw(*shape, dtype=dtype).requires_grad_(), draw(shape[-1], dtype=dtype, seed=1)
    check(
        lambda x: rms_norm(x, weight, 1e-5, one_plus=one_plus),
        lambda x: norm_reference(x, weight, 1e-5, one_plus),
        [x],
        dtype,
    )
    assert calls == ["veneer_norm"] * 2


@DTYPES
@pytest.mark.parametrize("activation", ACT)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_gated(dtype: torch.dtype, activation: str, size: float, calls: list[str]) -> None:
    """act(gate) * up and both gradients, also where the activation is flat."""
    leaves = [(draw(2, 190, 48, dtype=dtype, seed=seed) * size).requires_grad_() for seed in (1, 2)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    check(lambda g, u: gated(g, u, activation), lambda g, u: ACT[activation](g) * u, leaves, dtype)
    assert calls == ["veneer_gated"] * 2


@DTYPES
@pytest.mark.parametrize("width", [16, 32, 64, 80])
def test_rotary(dtype: torch.dtype, width: int, calls: list[str]) -> None:
    """The rotation of both halves by angles of their own, and its transpose."""
    cos, sin = draw(90, width, dtype=dtype, seed=1), draw(90, width, dtype=dtype, seed=2)
    leaves = [draw(90, heads, width, dtype=dtype, seed=heads).requires_grad_() for heads in (3, 1)]
    check(
        lambda q, k: torch.cat([x.flatten() for x in rotary(q, k, cos, sin)]),
        lambda q, k: torch.cat([rotary_reference(x, cos, sin).flatten() for x in (q, k)]),
        leaves,
        dtype,
    )
    assert calls == ["veneer_rotate"] * 2


def operations(dtype: torch.dtype, tokens: int) -> list[tuple[Any, tuple[Any, ...], int]]:
    """Every operation that has a form in C++, arguments for it, and how many of them have a row per token."""
    g, x, up = (draw(tokens, 96, dtype=dtype, seed=seed) for seed in range(3))
    weight, heads = draw(96, dtype=dtype, seed=3), [t.view(tokens, 3, 32) for t in (x, up)]
    angles = [draw(tokens, 32, dtype=dtype, seed=seed) for seed in (4, 5)]
    return [
        (lambda x, *rest: native.norm(None, x, *rest), (x, weight, 1e-6, False), 1),
        (native.norm, (g, x, weight, 1e-6, True), 2),
        (native.gated_forward, (x, up, "silu"), 2),
        (native.gated_backward, (g, x, up, "gelu_tanh"), 3),
        (native.rotate, (*heads, *angles, 1), 4),
        (native.rotate, (*heads, *angles, -1), 4),
    ]


def bits(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


@DTYPES
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    """Rows are independent of each other."""
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([t for run, args, _ in operations(dtype, 301) for t in bits(run(*args))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@DTYPES
def test_a_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    """The other tokens keep their bits, whichever input it stands in."""
    for run, args, rows in operations(dtype, 5):
        clean = bits(run(*args))
        for i in range(rows):
            spoilt = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
            spoilt[i][2] = float("nan")
            found = bits(run(*spoilt))
            assert any(t[2].isnan().any() for t in found)
            for a, b in zip(clean, found, strict=True):
                assert torch.equal(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]])


def test_what_it_does_not_take_goes_the_plain_way(calls: list[str]) -> None:
    """float64, mixed dtypes and odd widths."""
    wide, x = draw(4, 32, dtype=torch.float64), draw(4, 32, dtype=torch.float32)
    weight = torch.ones(32)
    odd = draw(4, 24, dtype=torch.float32)
    assert native.norm(None, wide, weight.double(), 1e-6, False) is None
    assert native.norm(None, x.bfloat16(), weight, 1e-6, False) is None
    assert native.norm(None, odd, weight[:24], 1e-6, False) is None
    assert native.gated_forward(odd[:1], odd[:1], "silu") is None
    assert torch.equal(rms_norm(odd, weight[:24], 1e-6), norm_forward(odd, weight[:24], 1e-6, False))
    assert torch.equal(gated(odd[:1], odd[:1], "silu"), gated_forward(odd[:1], odd[:1], "silu"))
    assert library() is not None and calls == []


def test_tensors_with_gaps_are_taken(calls: list[str]) -> None:
    """As gradients often arrive: the bits of the same numbers without gaps."""
    for run, args, _ in operations(torch.bfloat16, 5):
        gaps = [a.repeat_interleave(2, -1)[..., ::2] if isinstance(a, Tensor) else a for a in args]
        assert all(torch.equal(a, b) for a, b in zip(bits(run(*args)), bits(run(*gaps)), strict=True))
    assert len(calls) == 12
