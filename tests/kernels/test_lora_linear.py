"""The fused adapted linear against the plain form, in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.lora.dora_norm import dora_norm, squared_row_norms
from veneer.kernels.lora.dropout import Dropout, drop
from veneer.kernels.lora.linear import (
    Factors,
    GroupedBranch,
    Layer,
    SingleBranch,
    TokenGrid,
    adapted_linear,
    pad_factors,
)
from veneer.kernels.lora.reference import AdapterTerm, adapted

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
MASTER = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}


class Case:
    """Random layers on one input and random adapters on some of its tokens."""

    def __init__(self, dtype: torch.dtype, lead: tuple[int, ...], k: int, outs: list[int], bias: bool) -> None:
        self.draw = torch.Generator().manual_seed(1)
        self.dtype, self.k = dtype, k
        self.x = self.random(*lead, k, dtype=dtype).requires_grad_()
        self.layers: list[Layer] = [
            (self.random(o, k, dtype=dtype) / k**0.5, self.random(o, dtype=dtype) if bias else None) for o in outs
        ]
        self.shares: list[SingleBranch] = []

    def random(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=self.draw, dtype=torch.float64).to(dtype)

    def factors(self, h: int, r: int, dora: bool, dropout: Dropout | None = None) -> Factors:
        weight = self.layers[h][0]
        master = MASTER[self.dtype]
        a = (self.random(r, self.k) / self.k**0.5).to(master).requires_grad_()
        b = (self.random(weight.shape[0], r) * 0.3).to(master).requires_grad_()
        if not dora:
            return Factors(a, b, 1.7, dropout=dropout)
        squared = squared_row_norms(weight)
        spread = 1 + 0.2 * self.random(weight.shape[0]).to(squared.dtype)
        magnitude = (squared.sqrt() * spread).to(master).requires_grad_()
        with torch.no_grad():
            norm = dora_norm(weight, squared, a, b, 1.7)
        return Factors(a, b, 1.7, magnitude, norm, dropout)

    def add(self, rows: Any, weight: Any, ranks: list[int | None], *, dora: bool = False, p: float = 0.0) -> None:
        factors = [
            None if r is None else self.factors(h, r, dora, Dropout(p, 7 * len(self.shares) + h + 4) if p else None)
            for h, r in enumerate(ranks)
        ]
        self.shares.append(SingleBranch(rows, weight, factors))

    def leaves(self) -> list[Tensor]:
        masters = [m for share in self.shares for m in share.masters if m is not None]
        return [self.x, *masters]

    def fast(self) -> tuple[Tensor, ...]:
        return adapted_linear(self.x, self.layers, self.shares)

    def grouped(
        self, tokens: list[Tensor], factors: list[list[Factors | None]], weights: list[Any]
    ) -> tuple[Tensor, ...]:
        """All adapters as one branch."""
        grid = TokenGrid(tokens, weights)
        return adapted_linear(
            self.x, self.layers, [GroupedBranch(grid, factors, pad_factors(factors, self.layers, grid))]
        )

    def plain(self) -> tuple[Tensor, ...]:
        return tuple(self._plain(h) for h in range(len(self.layers)))

    def _plain(self, h: int) -> Tensor:
        weight, bias = self.layers[h]
        y = F.linear(self.x, weight, bias)
        x_NK = self.x.reshape(-1, self.k)
        terms = [term(share, dict(share.parts)[h], len(x_NK)) for share in self.shares if h in dict(share.parts)]
        return adapted(y.reshape(-1, y.shape[-1]), x_NK, bias, terms).view(y.shape)


def term(share: SingleBranch, f: Factors, tokens: int) -> AdapterTerm:
    chosen = torch.arange(tokens)[share.tokens] if isinstance(share.tokens, slice) else share.tokens
    scale = None if f.magnitude is None or f.norm is None else f.magnitude.to(f.norm.dtype) / f.norm

    def low(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, f.a.to(x.dtype)), f.b.to(x.dtype)) * f.scale

    dropout = f.dropout
    dropping = None if dropout is None else (lambda x: drop(x, *dropout))
    weight = share.weight.to(torch.float64) if isinstance(share.weight, Tensor) else share.weight
    return AdapterTerm(chosen, weight, low, dropping, scale)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def check(case: Case, ours: tuple[Tensor, ...] | None = None) -> None:
    """Outputs and every gradient within the tolerance of the compute dtype; gradients in the dtype of their leaf."""
    ours, theirs = case.fast() if ours is None else ours, case.plain()
    slopes = [case.random(*y.shape, dtype=case.dtype) for y in theirs]
    leaves = case.leaves()
    found = torch.autograd.grad(ours, leaves, slopes)
    expected = torch.autograd.grad(theirs, leaves, slopes)
    assert all(gradient.is_contiguous() for gradient in found)
    bound = TOLERANCE[case.dtype]
    for a, b in zip([*ours, *found], [*theirs, *expected], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative(a, b) < bound


DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


@DTYPES
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("lead", [(5,), (1, 70), (2, 3, 4)], ids=str)
def test_one_adapter_on_everything(dtype: torch.dtype, dora: bool, bias: bool, lead: tuple[int, ...]) -> None:
    """One adapter on all tokens, for few tokens (S on the outputs) and many (S on W's rows), any leading sizes, ranks 1 to 7."""
    case = Case(dtype, lead, 32, [24, 9, 40], bias)
    case.add(None, 1.0, [7, 1, 4], dora=dora)
    check(case)


@DTYPES
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_on_their_own_cells(dtype: torch.dtype, dora: bool) -> None:
    """Adapters on slices and on scattered tokens, ranks and layers differing, base tokens between them."""
    case = Case(dtype, (1, 50), 32, [24, 9], True)
    case.add(slice(3, 20), 1.0, [4, 2], dora=dora)
    case.add(torch.tensor([49, 21, 30, 0]), 1.0, [None, 5])
    case.add(slice(33, 34), 1.0, [1, 1], dora=True)
    check(case)


@DTYPES
def test_weighted_adapters_on_the_same_cells(dtype: torch.dtype) -> None:
    """LoRA adapters may share tokens, with one weight or one a token."""
    case = Case(dtype, (30,), 16, [24], False)
    case.add(None, 0.7, [4])
    case.add(slice(5, 12), torch.linspace(-1, 2, 7), [3])
    case.add(torch.tensor([6, 5, 29]), -0.5, [2])
    check(case)


@DTYPES
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.05, 0.6])
def test_dropout_takes_the_same_mask_as_the_plain_form(dtype: torch.dtype, dora: bool, p: float) -> None:
    """Each layer draws its own places from its own seed, and backward takes the same ones."""
    case = Case(dtype, (2, 40), 32, [24, 9], False)
    case.add(slice(0, 50), 1.0, [4, 3], dora=dora, p=p)
    case.add(slice(50, 80), 1.0, [2, None])
    check(case)


def test_a_magnitude_of_zero_has_its_gradient() -> None:
    """Where m is zero the output tells nothing of z; the gradient of m is exact there too."""
    case = Case(torch.float64, (40,), 16, [24], False)
    case.add(None, 1.0, [4], dora=True)
    factors = case.shares[0].parts[0][1]
    assert factors.magnitude is not None
    with torch.no_grad():
        factors.magnitude[5] = 0
    case.shares = [SingleBranch(None, 1.0, [factors])]
    check(case)


def test_a_gain_of_one_changes_no_bit() -> None:
    """S = 1 and B = 0: the output is the base's to the bit, whichever way the scale is applied."""
    for tokens in (8, 64):
        case = Case(torch.float32, (tokens,), 16, [24], False)
        weight = case.layers[0][0]
        squared = squared_row_norms(weight)
        zero = torch.zeros(24, 4)
        factors = Factors(torch.randn(4, 16), zero, 2.0, squared.sqrt(), squared.sqrt())
        y = adapted_linear(case.x, case.layers, [SingleBranch(None, 1.0, (factors,))])[0]
        assert torch.equal(y, F.linear(case.x, weight))


def test_other_cells_keep_their_bits() -> None:
    """Cells without an adapter, and those of a neighbour, are the same whatever an adapter holds, NaN too, forward and backward."""
    outcomes = []
    for poison in (1.0, float("nan")):
        case = Case(torch.float32, (40,), 16, [24, 8], False)
        case.add(slice(0, 10), 1.0, [4, 4], dora=True)
        case.add(slice(10, 20), 1.0, [3, 3])
        with torch.no_grad():
            case.shares[1].parts[0][1].a.mul_(poison)
        ys = case.fast()
        sum(y.square().sum() for y in ys).backward()
        outcomes.append([*(y.detach() for y in ys), case.x.grad, case.shares[0].parts[0][1].b.grad])
    healthy, ill = outcomes
    others = torch.cat((torch.arange(10), torch.arange(20, 40)))
    assert all(torch.equal(a[others], b[others]) for a, b in zip(healthy[:3], ill[:3], strict=True))  # type: ignore[index]
    assert torch.equal(healthy[3], ill[3]) and torch.isnan(ill[0][10:20]).all()  # type: ignore[arg-type,index]


def test_frozen_adapters_still_pass_gradients_to_the_input() -> None:
    """Masters that require no gradient get none; x gets the same gradient as in the plain form; the input is not kept for them."""
    case = Case(torch.float64, (20,), 16, [24], False)
    case.add(None, 1.0, [4], dora=True)
    for leaf in case.leaves()[1:]:
        leaf.requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = case.fast()[0]
    g = case.random(*y.shape)
    ours = torch.autograd.grad(y, case.x, g)[0]
    assert relative(ours, torch.autograd.grad(case.plain()[0], case.x, g)[0]) < 1e-12
    assert all(t.shape != case.x.shape for t in kept)


def test_no_input_gradient_is_computed_where_none_is_asked_for() -> None:
    """Where the input requires no gradient (frozen embeddings below the lowest site), no product with W runs in backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
                shapes.append(tuple(out.shape))
            return out

    case = Case(torch.float32, (20,), 16, [24], False)
    case.add(None, 1.0, [4])
    case.x = case.x.detach()
    y = case.fast()[0]
    with Products():
        y.sum().backward()
    assert (20, 16) not in shapes and len(shapes) == 3  # G, dA, dB


def test_an_unused_output_costs_nothing_and_breaks_nothing() -> None:
    """Where a model uses some of the layers' outputs only, the others' masters get zeros or nothing."""
    case = Case(torch.float64, (20,), 16, [24, 9], False)
    case.add(None, 1.0, [4, 3])
    case.fast()[0].sum().backward()
    ours = [leaf.grad for leaf in case.leaves()]
    for leaf in case.leaves():
        leaf.grad = None
    case.plain()[0].sum().backward()
    for a, leaf in zip(ours, case.leaves(), strict=True):
        assert (a is None or not a.any()) if leaf.grad is None else a is not None and relative(a, leaf.grad) < 1e-12


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_nothing_as_wide_as_the_output_is_kept(dora: bool) -> None:
    """What is kept for backward: the input, one copy, and products of rank r; for DoRA the output itself, which is not a copy."""
    case = Case(torch.float32, (64,), 16, [24, 24], False)
    case.add(None, 1.0, [2, 2], dora=dora)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        ys = case.fast()
    wide = [t for t in kept if t.shape[0] == 64 and t.shape[1] >= 16]
    own = {case.x.data_ptr(), *(y.data_ptr() for y in ys)}
    assert {t.data_ptr() for t in wide} <= own and len(wide) == (3 if dora else 1)


def test_a_model_may_go_on_in_place() -> None:
    """Changing a LoRA layer's output in place is right; a DoRA layer's own output is needed, and autograd refuses to go wrong."""
    case = Case(torch.float64, (20,), 16, [24, 9], False)
    case.add(None, 1.0, [4, 3])
    y = case.fast()[0]
    y.mul_(2)
    y.sum().backward()
    expected = torch.autograd.grad(2 * case.plain()[0].sum(), case.x)[0]
    assert case.x.grad is not None and relative(case.x.grad, expected) < 1e-12
    case = Case(torch.float64, (20,), 16, [24], False)
    case.add(None, 1.0, [4], dora=True)
    y = case.fast()[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_without_gradients_nothing_is_kept() -> None:
    """Under no_grad and in inference mode the values are the same, and outputs require no gradient."""
    case = Case(torch.float32, (20,), 16, [24], False)
    case.add(None, 1.0, [4], dora=True)
    y = case.fast()[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = case.fast()[0]
        assert not again.requires_grad and torch.equal(again, y)


def test_no_cells() -> None:
    """An empty batch gives empty outputs and zero gradients."""
    case = Case(torch.float32, (0,), 16, [24], False)
    case.add(None, 1.0, [4])
    y = case.fast()[0]
    y.sum().backward()
    assert y.shape == (0, 24)


GRIDS = {
    "one row each": [[0], [1], [2], [3], [4]],
    "in line": [[6, 7, 8], [9, 10, 11], [12, 13, 14]],
    "scattered": [[5, 29], [0, 1], [17, 3]],
    "unequal": [[4, 5, 6, 7, 8, 9], [20], [10, 11, 12], [29, 28]],
}


@DTYPES
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_groups(dtype: torch.dtype, name: str, bias: bool) -> None:
    """Several adapters in one branch: unequal ranks, methods, weights and numbers of tokens, some without some layers, base tokens too."""
    case = Case(dtype, (30,), 16, [24, 9, 12], bias)
    tokens = [torch.tensor(own) for own in GRIDS[name]]
    weights: list[Any] = [1.0, 0.5, torch.linspace(0.5, 2, len(tokens[2])).double(), 1.0, 1.0][: len(tokens)]
    for j, (own, weight) in enumerate(zip(tokens, weights, strict=True)):
        ranks: list[int | None] = [3 + j, None if j == 1 else 2, None]
        case.add(own, weight, ranks, dora=weight is weights[0] or j == 3)
    factors = [[dict(share.parts).get(h) for h in range(3)] for share in case.shares]
    check(case, case.grouped(tokens, factors, weights))


def test_a_group_keeps_a_nan_with_its_adapter() -> None:
    """A NaN in one adapter's factors reaches neither another adapter's tokens nor its gradients, nor the base's tokens."""
    outcomes = []
    for poison in (1.0, float("nan")):
        case = Case(torch.float32, (12,), 16, [24], False)
        tokens = [torch.tensor([0, 1, 2]), torch.tensor([3]), torch.tensor([8, 5])]
        for own in tokens:
            case.add(own, 1.0, [4], dora=True)
        with torch.no_grad():
            case.shares[1].parts[0][1].a.mul_(poison)
        y = case.grouped(tokens, [[share.parts[0][1]] for share in case.shares], [1.0, 1.0, 1.0])[0]
        y.square().sum().backward()
        outcomes.append([y.detach(), case.x.grad, *(case.shares[j].parts[0][1].a.grad for j in (0, 2))])
    others = torch.arange(12) != 3
    assert all(torch.equal(a[others], b[others]) for a, b in zip(outcomes[0][:2], outcomes[1][:2], strict=True))  # type: ignore[index]
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][2:], outcomes[1][2:], strict=True))  # type: ignore[arg-type]
    assert torch.isnan(outcomes[1][0][3]).all()  # type: ignore[index]


def test_a_group_with_a_magnitude_of_zero_has_its_gradient() -> None:
    """Where one adapter's m is zero its gradient is exact there too."""
    case = Case(torch.float64, (8,), 16, [24], False)
    tokens = [torch.tensor([0, 1]), torch.tensor([4, 5, 6])]
    for own in tokens:
        case.add(own, 1.0, [4], dora=True)
    factors = [share.parts[0][1] for share in case.shares]
    assert factors[1].magnitude is not None
    with torch.no_grad():
        factors[1].magnitude[5] = 0
    case.shares = [SingleBranch(own, 1.0, [f]) for own, f in zip(tokens, factors, strict=True)]
    check(case, case.grouped(tokens, [[f] for f in factors], [1.0, 1.0]))
