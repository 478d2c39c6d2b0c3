"""RMSNorm, gated activations and rotary embedding with backward by hand, against autograd through their definitions; and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.elementwise import compiled
from veneer.kernels.elementwise.compiled import Chain, compile_chains, status
from veneer.kernels.elementwise.functions import gated, gated_backward, gated_backward_text, rms_norm, rotary

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


@pytest.fixture
def switched() -> Iterator[None]:
    """Compiled chains inside the test, plain ones after it."""
    compile_chains(True)
    yield
    compile_chains(False)


def can_compile() -> str:
    """Why nothing can be compiled here, or empty."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        return f"no C++ compiler: {error}"
    return ""


@pytest.mark.usefixtures("switched")
def test_compiled_chains_agree_over_fifty_token_counts_with_three_graphs_at_most() -> None:
    """A compiled chain gives the plain function's results for every token count, and does not compile anew for each."""
    if reason := can_compile():
        pytest.skip(reason)
    chain = Chain(lambda x, weight: x.square().mean(-1, keepdim=True).rsqrt() * x * weight, 1)
    chain.plain.__name__ = "sample"
    weight = draw(24, dtype=torch.float32, seed=1)
    made: list[int] = []
    inner = torch.compile

    def counting(function: Any, **options: Any) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            from torch._inductor.compile_fx import compile_fx

            made.append(1)
            return compile_fx(graph, inputs)

        return inner(function, backend=backend, **options)

    compiled.torch.compile = counting
    try:
        for tokens in [*range(1, 41), 100, 128, 200, 333, 512, 777, 1000, 1024, 1500, 2048]:
            x = draw(tokens, 24, dtype=torch.float32, seed=tokens)
            assert torch.allclose(chain(x, weight), chain.plain(x, weight), rtol=1e-5, atol=1e-6)
    finally:
        compiled.torch.compile = inner
    assert status().reason == "" and chain.graphs == 1
    assert 1 <= len(made) <= 3


def broken(x: Tensor) -> Tensor:
    return x * 2 if torch.compiler.is_compiling() else x


def unfit(x: Tensor) -> Tensor:
    if float(x.sum()) > 1e9:  # no graph can be made over a decision on values
        return x
    return x + 1


@pytest.mark.usefixtures("switched")
@pytest.mark.parametrize(("function", "reason"), [(broken, "something else"), (unfit, "failed")])
def test_falling_back_is_right_and_reported(function: Callable[[Tensor], Tensor], reason: str) -> None:
    """What cannot be compiled, or computes something else once compiled, runs plain, and the status says why."""
    if missing := can_compile():
        pytest.skip(missing)
    chain = Chain(function, 1)
    x = draw(4, 8, dtype=torch.float32)
    for _ in range(2):
        assert torch.equal(chain(x), function(x))
    assert reason in status().reason and function.__name__ in status().reason and chain.graphs == 0


def test_without_being_asked_nothing_is_compiled() -> None:
    """Chains are plain functions until a run asks for more."""
    chain = Chain(unfit, 1)
    chain(draw(4, 8, dtype=torch.float32))
    assert not status().on and chain.graphs == 0


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_what_is_compiled_is_the_plain_function(dtype: torch.dtype, activation: str) -> None:
    """The text that is written for the compiler gives the same gradients."""
    d, gate, up = (draw(9, 24, dtype=dtype, seed=seed) for seed in range(3))
    pairs = zip(gated_backward_text(d, gate, up, activation), gated_backward(d, gate, up, activation), strict=True)
    for found, known in pairs:
        assert found.dtype == dtype
        assert float((found.double() - known.double()).norm()) <= TOLERANCE[dtype] * float(known.double().norm())
