"""Kernels in C++: they compute what the plain forms do, and where they cannot be had the plain forms go on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.made import nudge
from tests.kernels.test_lora_linear import TOLERANCE, Case, check, relative
from tests.tiny import tiny

from veneer.adapters import DoRA, LoRA, attach
from veneer.adapters.runtime import fast_path
from veneer.kernels import cpp_library as native
from veneer.kernels.frozen_linear import linear, longest_product
from veneer.kernels.lora.dora_norm import dora_norms, squared_row_norms
from veneer.kernels.lora.linear import AdapterSpan, Factors, NativeBranch, adapted_linear, fits
from veneer.kernels.lora.native import agrees

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class NativeCase(Case):
    """All adapters of the case as one branch."""

    def fast(self) -> tuple[torch.Tensor, ...]:
        return adapted_linear(self.x, self.layers, [self.branch()])

    def branch(self, *, lasting: bool = False) -> NativeBranch:
        spans: list[AdapterSpan] = []
        for share in self.shares:
            parts = dict(share.parts)
            factors = [parts.get(h) for h in range(len(self.layers))]
            assert fits(self.layers, factors)
            spans.append(AdapterSpan(share.tokens, share.weight, factors))
        return NativeBranch(self.layers, spans, lasting=lasting)


@pytest.mark.usefixtures("native_kernels")
@DTYPES
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5], ids=["", "dropout", "half"])
@pytest.mark.parametrize("lead", [(1,), (5,), (1, 70), (2, 3, 4), (700,)], ids=str)
def test_one_adapter_on_everything(dtype: torch.dtype, dora: bool, bias: bool, p: float, lead: tuple[int, ...]) -> None:
    """Few tokens and many (several chunks), odd numbers of them, ranks below and above a unit, wide and narrow outputs."""
    case = NativeCase(dtype, lead, 64, [32, 96, 64], bias)
    case.add(None, 1.0, [7, 1, 16], dora=dora, p=p)
    check(case)


@pytest.mark.usefixtures("native_kernels")
@DTYPES
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("lead", [(5,), (70,), (2, 150)], ids=str)
def test_weights_that_are_stored_the_other_way_round(dtype: torch.dtype, dora: bool, lead: tuple[int, ...]) -> None:
    """As [K, O], which Conv1D does: a view with its dimensions exchanged."""
    case = NativeCase(dtype, lead, 64, [32, 160], True)
    case.layers = [(weight.T.contiguous().T, bias) for weight, bias in case.layers]
    case.add(None, 1.0, [7, 16], dora=dora)
    check(case)
    check(case, Case.fast(case))


@pytest.mark.usefixtures("native_kernels")
@DTYPES
def test_adapters_on_their_own_tokens(dtype: torch.dtype) -> None:
    """Several adapters with ranks, layers, methods and weights of their own, base tokens between them."""
    case = NativeCase(dtype, (1, 400), 32, [96, 32], True)
    case.add(slice(3, 20), 1.0, [4, 2], dora=True)
    case.add(slice(20, 21), 0.3, [None, 5])
    case.add(slice(21, 321), torch.linspace(-1, 2, 300), [16, None], p=0.1)
    case.add(slice(390, 400), 1.0, [8, 9], dora=True, p=0.3)
    check(case)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("sizes", [(1, 32, 32), (13, 64, 96), (70, 96, 320), (5, 48, 32)], ids=str)
def test_products_of_pairs(sizes: tuple[int, int, int], bias: bool) -> None:
    """x W^T + b in bf16, rounded once: as near to fp64 as bf16 is; sizes that it does not take go to torch."""
    n, k, out = sizes
    draw = torch.Generator().manual_seed(n)
    x, w, b = (torch.randn(*s, generator=draw).bfloat16() for s in ((n, k), (out, k), (out,)))
    found = linear(x, w, b if bias else None).double()
    expected = x.double() @ w.double().T + (b.double() if bias else 0)
    assert float((found - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
def test_a_magnitude_of_zero_has_its_gradient(p: float) -> None:
    """Its output is zero, so what m multiplies is computed again, from what dropout left of the input."""
    case = NativeCase(torch.float32, (30,), 32, [32], True)
    case.add(None, 1.0, [4], dora=True, p=p)
    magnitude = case.shares[0].parts[0][1].magnitude
    assert magnitude is not None
    with torch.no_grad():
        magnitude[5] = 0.0
    check(case)


@pytest.mark.usefixtures("native_kernels")
def test_no_tokens() -> None:
    """An empty batch gives empty outputs and zero gradients."""
    case = NativeCase(torch.float32, (0,), 32, [32], False)
    case.add(None, 1.0, [4])
    y = case.fast()[0]
    y.sum().backward()
    assert y.shape == (0, 32)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in case.leaves()[1:])


@pytest.mark.usefixtures("native_kernels")
@DTYPES
def test_a_nan_stays_with_its_adapter(dtype: torch.dtype) -> None:
    """Tokens and gradients of the neighbours, and base tokens, keep their bits."""
    outcomes = []
    for poison in (1.0, float("nan")):
        case = NativeCase(dtype, (200,), 32, [96, 32], False)
        case.add(slice(0, 61), 1.0, [4, 4])
        case.add(slice(61, 130), 1.0, [3, 3])
        with torch.no_grad():
            case.shares[1].parts[0][1].a.mul_(poison)
        ys = case.fast()
        sum(y.float().square().sum() for y in ys).backward()  # type: ignore[union-attr]
        healthy = [m.grad for m in case.shares[0].masters if m is not None]
        outcomes.append((torch.cat([*ys, case.x.grad], 1).detach(), healthy))  # type: ignore[list-item]
    (rows, own), (ill, still) = outcomes
    others = torch.cat((torch.arange(61), torch.arange(130, 200)))
    assert torch.equal(rows[others], ill[others]) and ill[61:130].isnan().any(1).all()
    assert all(torch.equal(a, b) for a, b in zip(own, still, strict=True))


@pytest.mark.usefixtures("native_kernels")
@DTYPES
def test_bits_depend_neither_on_threads_nor_on_neighbours(dtype: torch.dtype) -> None:
    """One thread or three, alone or in a batch with others: the same gradients of the factors to the bit."""
    before = torch.get_num_threads()
    outcomes: list[Sequence[torch.Tensor]] = []
    try:
        for threads, others in ((1, False), (3, False), (3, True)):
            torch.set_num_threads(threads)
            case = NativeCase(dtype, (900,), 32, [96], False)
            case.add(slice(0, 600), 1.0, [8])
            if others:
                case.add(slice(600, 700), 1.0, [16])
            y = case.fast()[0]
            y.float().square().sum().backward()
            assert case.x.grad is not None
            grads = [m.grad for m in case.shares[0].masters if m is not None and m.grad is not None]
            outcomes.append(grads)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.usefixtures("native_kernels")
@DTYPES
@pytest.mark.parametrize("shape", [(33, 32), (96, 80)], ids=str)
def test_norms_of_several_adapters_in_one_pass(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """As by the definition in fp64; with B = 0 the root of ||W||^2 to the bit; a NaN stays in its adapter."""
    draw = torch.Generator().manual_seed(3)
    out, k = shape
    weight = torch.randn(out, k, generator=draw).to(dtype)
    adapters = [
        (torch.randn(r, k, generator=draw), torch.randn(out, r, generator=draw), s) for r, s in ((1, 2.0), (9, 0.3))
    ]
    adapters += [(adapters[0][0], torch.zeros(out, 1), 1.0), (adapters[0][0] * float("nan"), adapters[0][1], 1.0)]
    squared = squared_row_norms(weight)
    found = dora_norms(weight, squared, adapters)
    for norm, (a, b, scale) in zip(found[:2], adapters, strict=False):
        expected = (weight.double() + scale * (b.double() @ a.double())).norm(dim=1)
        assert float((norm - expected).norm() / expected.norm()) < 1e-6
    assert torch.equal(found[2], squared.sqrt()) and found[3].isnan().all()


@pytest.mark.usefixtures("native_kernels")
def test_a_backward_ends_as_its_forward_began() -> None:
    """Kernels that are put away between the two are still those of the backward."""
    case = NativeCase(torch.float32, (5,), 32, [32], False)
    case.add(None, 1.0, [4])
    grads = []
    for put_away in (False, True):
        y = case.fast()[0]
        if put_away:
            native.use(None)
        grads.append(torch.autograd.grad(y.sum(), case.leaves()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.usefixtures("native_kernels")
def test_a_bias_of_another_dtype_is_left_to_torch() -> None:
    """Addresses tell nothing of a dtype, so such a layer is refused as torch refuses it."""
    case = Case(torch.bfloat16, (5,), 32, [32], True)
    ((weight, bias),) = case.layers
    assert bias is not None and fits(case.layers)
    assert not fits([(weight, bias.float())])


@pytest.mark.usefixtures("native_kernels")
def test_what_it_does_not_know_is_left_to_the_plain_forms() -> None:
    """Other dtypes and widths, high ranks, more places than dropout can name: `fits` says no."""
    for dtype, k, out, r in (
        (torch.float64, 32, 32, 4),
        (torch.float32, 48, 32, 4),
        (torch.float32, 32, 40, 4),
        (torch.float32, 32, 32, 17),
        (torch.bfloat16, 32, 32, 65),
    ):
        case = Case(dtype, (5,), k, [out], False)
        case.add(None, 1.0, [r])
        assert not fits(case.layers, [f for _, f in case.shares[0].parts])
    case = Case(torch.float32, (5,), 32, [32], False)
    case.add(None, 1.0, [4], p=0.1)
    factors = [f for _, f in case.shares[0].parts]
    assert fits(case.layers, factors, 2**31 - 1) and not fits(case.layers, factors, 2**31)


@pytest.mark.usefixtures("native_kernels")
def test_the_check_at_the_start_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes here, and would not if one gradient were a tenth too large."""
    assert agrees()
    inner = NativeBranch.gradients_

    def wrong(self: NativeBranch, back: Any, kept: Any) -> Any:
        first, *others = inner(self, back, kept)
        return [first * 1.1, *others]

    monkeypatch.setattr(NativeBranch, "gradients_", wrong)
    assert not agrees()


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler, one that fails, and a file that cannot be loaded each leave the plain forms and say why."""
    monkeypatch.setenv("CXX", "no-such-compiler-here")
    assert native.key() is None
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        native.build(tmp_path)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="false failed"):
        native.build(tmp_path)
    (tmp_path / "veneer_kernels.so").write_bytes(b"not a library")
    native.use(tmp_path)
    assert native.library() is None and "cannot be loaded" in native.reason()


@pytest.mark.usefixtures("native_kernels")
@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 70], ids=str)
def test_frozen_adapters_are_packed_once(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step of a mixed batch has the bits of the first and finds the factors packed; a change of a factor is seen."""
    model: Any = tiny("llama", dtype=dtype)
    bank = attach(model)
    for i, name in enumerate("abc"):
        nudge(bank.add(name, (DoRA if i else LoRA)(r=4 * (i + 1))), by=0.1, seed=i).requires_grad_(False)
    made: list[NativeBranch] = []
    init = NativeBranch.__init__

    def seen(self: NativeBranch, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(NativeBranch, "__init__", seen)
    monkeypatch.setattr(fast_path, "_FEW", {})
    batch = torch.randint(3, 300, (4, rows), generator=torch.Generator().manual_seed(rows))

    def run() -> torch.Tensor:
        with torch.no_grad(), bank.use(["a", "b", None, "c"]):
            logits: torch.Tensor = model(input_ids=batch).logits
        return logits

    first, second = run(), run()
    calls = len(made)
    assert calls and all(one._lasting and one._packed is not None for one in made) and torch.equal(first, second)
    with torch.no_grad():
        [*bank["b"].tensors.values()][-1]["lora_B"].mul_(2)
    third = run()
    assert len(made) > calls and torch.equal(first[[0, 2, 3]], third[[0, 2, 3]]) and not torch.equal(first[1], third[1])
    native.use(None)
    assert float((run() - third).norm() / third.norm()) < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.usefixtures("native_kernels")
@DTYPES
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_frozen_adapters_with_few_tokens_each(dtype: torch.dtype, turned: bool) -> None:
    """Products with the weights are taken of all tokens at once, and each adapter adds its own part; twice, the second time packed."""
    case = NativeCase(dtype, (9,), 64, [32, 96], True)
    if turned:
        case.layers = [(weight.T.contiguous().T, bias) for weight, bias in case.layers]
    for rows, ranks in ((slice(0, 1), [4, 7]), (slice(1, 4), [16, 1]), (slice(4, 9), [3, 9])):
        case.add(rows, 1.0, ranks, dora=rows.start == 1 and not turned)
    branch = case.branch(lasting=True)
    with torch.no_grad():
        first, second = (adapted_linear(case.x, case.layers, [branch]) for _ in range(2))
        expected = case.plain()
    assert branch._with_base == {9: dtype == torch.bfloat16 and longest_product() > 0}
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b) and relative(a, c) < TOLERANCE[dtype]


@pytest.mark.usefixtures("native_kernels")
def test_base_cells_keep_their_bits_beside_frozen_adapters() -> None:
    """In bf16 products may be taken in C++, but never for a cell that has no adapter."""
    model: Any = tiny("llama", dtype=torch.bfloat16)
    bank = attach(model)
    nudge(bank.add("a", LoRA(r=4)), by=0.1, seed=0).requires_grad_(False)
    batch = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=batch).logits
        with bank.use([None, "a", "a", None]):
            mixed = model(input_ids=batch).logits
    assert torch.equal(plain[[0, 3]], mixed[[0, 3]]) and not torch.equal(plain[1], mixed[1])


@pytest.mark.usefixtures("native_kernels")
def test_threads_share_a_branch() -> None:
    """Two threads that decode with the same frozen adapters at once get what each gets alone."""
    model: Any = tiny("llama")
    bank = attach(model)
    for i, name in enumerate("ab"):
        nudge(bank.add(name, LoRA(r=4)), by=0.1, seed=i).requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight
    layers = [(weight, None)]
    site = "model.layers.0.self_attn.q_proj"
    spans = [
        AdapterSpan(slice(i * 80, i * 80 + 80), 1.0, [_factors_of(bank[name], site)]) for i, name in enumerate("ab")
    ]
    branch = NativeBranch(layers, spans, lasting=True)
    inputs = [torch.randn(160, weight.shape[1], generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        expected = [adapted_linear(x, layers, [branch])[0] for x in inputs]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda i: adapted_linear(inputs[i % 2], layers, [branch])[0], range(200)))
    assert all(torch.equal(y, expected[i % 2]) for i, y in enumerate(found))


def _factors_of(adapter: Any, site: str) -> Factors:
    own = adapter.tensors[site]
    return Factors(own["lora_A"], own["lora_B"], adapter.scale(site))
