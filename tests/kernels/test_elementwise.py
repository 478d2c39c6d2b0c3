"""RMSNorm, gated activations and rotary embedding with backward by hand, against autograd through their definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.devices import PretendDevice
from torch import Tensor

from veneer.kernels.elementwise import functions
from veneer.kernels.elementwise.functions import gated, rms_norm, rotary
from veneer.kernels.forms import Forms, use_forms

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm_reference(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
    """As Llama's and Gemma's own modules write it."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (n * (1.0 + weight.to(n.dtype))).to(x.dtype) if one_plus else weight * n.to(x.dtype)


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


def check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: list[Tensor], dtype: torch.dtype) -> None:
    """Values and gradients of the leaves agree within the tolerance of the dtype."""
    y, expected = ours(*leaves), theirs(*leaves)
    g = draw(*y.shape, dtype=dtype, seed=9)
    found = [y, *torch.autograd.grad(y, leaves, g)]
    known = [expected, *torch.autograd.grad(expected, leaves, g)]
    for a, b in zip(found, known, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert float((a.double() - b.double()).detach().norm()) <= TOLERANCE[dtype] * float(b.detach().double().norm())


@DTYPES
@pytest.mark.parametrize("one_plus", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", [(3, 32), (1, 200, 24), (2, 3, 5, 8)], ids=str)
def test_norm(dtype: torch.dtype, one_plus: bool, shape: tuple[int, ...]) -> None:
    """RMSNorm in both forms, any leading sizes."""
    x, weight = draw(*shape, dtype=dtype).requires_grad_(), draw(shape[-1], dtype=dtype, seed=1)
    check(
        lambda x: rms_norm(x, weight, 1e-5, one_plus=one_plus),
        lambda x: norm_reference(x, weight, 1e-5, one_plus),
        [x],
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(dtype: torch.dtype, activation: str) -> None:
    """act(gate) * up and both gradients."""
    act = F.silu if activation == "silu" else lambda t: F.gelu(t, approximate="tanh")
    leaves = [draw(2, 7, 24, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2)]
    check(lambda g, u: gated(g, u, activation), lambda g, u: act(g) * u, leaves, dtype)


@DTYPES
def test_rotary(dtype: torch.dtype) -> None:
    """The rotation of both halves by angles of their own, as scaled variants have them."""
    cos, sin = draw(7, 8, dtype=dtype, seed=1), draw(7, 8, dtype=dtype, seed=2)
    leaves = [draw(7, heads, 8, dtype=dtype, seed=heads).requires_grad_() for heads in (3, 1)]
    check(
        lambda q, k: torch.cat(rotary(q, k, cos, sin), 1),
        lambda q, k: torch.cat([rotary_reference(x, cos, sin) for x in (q, k)], 1),
        leaves,
        dtype,
    )


def test_only_inputs_are_kept() -> None:
    """Backward keeps the inputs themselves and no intermediate result."""
    x, gate, up = (draw(6, 8, dtype=torch.bfloat16, seed=s).requires_grad_() for s in range(3))
    weight, cos, sin = torch.ones(8, dtype=torch.bfloat16), torch.ones(6, 8), torch.zeros(6, 8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rms_norm(x, weight, 1e-5)
        gated(gate, up, "silu")
        rotary(x.view(6, 1, 8).float(), x.view(6, 1, 8).float(), cos, sin)
    own = {t.data_ptr() for t in (x, gate, up, weight, cos, sin)}
    assert {t.data_ptr() for t in kept} <= own


def chains() -> list[Tensor]:
    """Every chain forward and backward, on this device or the one that is pretended."""
    device = torch.get_default_device() if not torch.cuda.is_available() else torch.device("cuda:0")
    x, g = (draw(6, 16, dtype=torch.float32, seed=n).to(device).requires_grad_() for n in (1, 2))
    weight, cos, sin = (
        draw(*size, dtype=torch.float32, seed=n).to(device) for n, size in ((3, (16,)), (4, (6, 8)), (5, (6, 8)))
    )
    q, k = (draw(6, heads, 8, dtype=torch.float32, seed=heads).to(device).requires_grad_() for heads in (4, 2))
    outs = [rms_norm(x, weight, 1e-6), gated(x, g, "silu"), *rotary(q, k, cos, sin)]
    grads = torch.autograd.grad(sum(out.square().sum() for out in outs), (x, g, q, k))  # type: ignore[arg-type]
    return [t.detach() for t in (*outs, *grads)]


def test_a_device_takes_the_compiled_chains_if_they_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the five functions, forward and backward; without that choice, and on a CPU, none."""
    taken: list[str] = []

    def compiled(function: Callable[..., object]) -> Callable[..., object]:
        taken.append(function.__name__)
        return function

    monkeypatch.setattr(functions, "compiled", compiled)
    with use_forms(Forms(elementwise="compiled")):
        expected = chains()
        assert taken == []
        with PretendDevice():
            found = [t.to("cpu") for t in chains()]
    assert taken == ["norm_forward", "gated_forward", "rotate", "rotate", "gated_backward", "norm_backward"]
    with PretendDevice():
        chains()
    assert len(taken) == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_compiled_chains_give_the_same() -> None:
    """Compiled for the CPU, in several sizes, the functions give what they give as they are."""
    pytest.importorskip("torch._inductor")
    for rows in (5, 70):
        x, g = (draw(rows, 32, dtype=torch.float32, seed=n) for n in (1, 2))
        weight = draw(32, dtype=torch.float32, seed=3)
        for function, args in (
            (functions.norm_forward, (x, weight, 1e-6, False)),
            (functions.norm_backward, (g, x, weight, 1e-6, True)),
            (functions.gated_forward, (x, g, "silu")),
            (functions.gated_backward, (g, x, g, "gelu_tanh")),
        ):
            found, expected = functions.compiled(function)(*args), function(*args)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
