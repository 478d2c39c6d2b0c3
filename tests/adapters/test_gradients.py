"""Gradients against finite differences and against the closed form that the papers give, in fp64, on every kind of layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.adapters.made import CASES, Case, nudge
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from veneer.adapters import Bank, DoRA, LoRA, attach

EVERY = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
Method = LoRA | DoRA
EXACT = DoRA(r=2, lora_alpha=3, target_modules="layer", exact_norm_gradient=True)
DETACHED = DoRA(r=2, lora_alpha=3, target_modules="layer")
PLAIN = LoRA(r=2, lora_alpha=3, target_modules="layer")


def checked(case: Case, method: Method, *, fused: bool = True) -> bool:
    """`gradcheck` of the layer's output as a function of the adapter's tensors and of the input."""
    model = case.model(torch.float64)
    bank = attach(model)
    bank.fast_path = fused
    nudge(bank.add("a", method), by=0.4)
    own = bank["a"].tensors["layer"]
    x = case.input(torch.float64)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(own.values(), values, strict=True):
                assert torch.equal(parameter, value)
        with bank.use("a"):
            result: Tensor = model(x)
        return result

    # The masters themselves are varied in place by gradcheck.
    inputs = (x if case.vocabulary else x.requires_grad_(), *own.values())
    return torch.autograd.gradcheck(output, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("method", [PLAIN, EXACT], ids=["lora", "dora-exact"])
def test_gradients_match_finite_differences(case: Case, method: Method) -> None:
    """LoRA's gradients, and DoRA's with the gradient through the norm, are those of the function that forward computes."""
    assert checked(case, method)
    if type(case.make()) is nn.Linear:
        assert checked(case, method, fused=False)


@EVERY
def test_detached_dora_is_not_the_gradient_of_its_output(case: Case) -> None:
    """With the norm held constant the gradient is another one on purpose: finite differences must disagree."""
    with pytest.raises(GradcheckError):
        checked(case, DETACHED)


def dense_gradients(bank: Bank, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(G^T X as [out, in], x's own gradient of the base product) by autograd through a dense weight in the layer's own arithmetic."""
    site = bank.sites["layer"]
    merged = bank.merged_state_dict("a")["layer.weight"].clone().requires_grad_()
    leaf = x.clone().requires_grad_() if x.is_floating_point() else x
    y = torch.func.functional_call(site.module, {"weight": merged}, (leaf,))
    y.backward(g)
    assert merged.grad is not None
    as_2d: Callable[[Tensor], Tensor] = lambda w: w.T if site.kind in ("conv1d", "embedding") else w.flatten(1)  # noqa: E731
    return as_2d(merged.grad), leaf.grad if x.is_floating_point() else torch.zeros(())


@EVERY
@pytest.mark.parametrize("method", [PLAIN, DETACHED, EXACT], ids=["lora", "dora-detached", "dora-exact"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_gradients_match_the_closed_form(case: Case, method: Method, fused: bool) -> None:
    """dA, dB and dm are what the papers write, with H = G^T X: s B^T (c H), s (c H) A^T and rowsum(H V') / n; for the exact form c H
    loses its part along V'."""
    model = case.model(torch.float64)
    bank = attach(model)
    bank.fast_path = fused
    nudge(bank.add("a", method), by=0.4)
    x = case.input(torch.float64)
    if x.is_floating_point():
        x.requires_grad_()
    with bank.use("a"):
        y = model(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(g)
    h_OK, dx = dense_gradients(bank, x.detach(), g)
    own = list(bank["a"].tensors["layer"].values())
    a_RK, b_OR = own[0].detach().flatten(1), own[1].detach().flatten(1)
    scale = bank["a"].scale("layer")
    v_OK = bank.sites["layer"].weight_2d + scale * b_OR @ a_RK
    n_O = v_OK.norm(dim=1)
    if isinstance(method, DoRA):
        m_O = own[2].detach()
        c_O = m_O / n_O
        radial_O = (h_OK * v_OK).sum(1)
        wanted = radial_O / n_O
        assert own[2].grad is not None and torch.allclose(own[2].grad, wanted, rtol=1e-9, atol=1e-11)
        if method.exact_norm_gradient:
            h_OK = h_OK - (radial_O / n_O.square()).unsqueeze(1) * v_OK
        h_OK = c_O.unsqueeze(1) * h_OK
    grads = [p.grad.flatten(1) for p in own[:2] if p.grad is not None]
    assert torch.allclose(grads[0], scale * b_OR.T @ h_OK, rtol=1e-9, atol=1e-11)
    assert torch.allclose(grads[1], scale * h_OK @ a_RK.T, rtol=1e-9, atol=1e-11)
    if x.is_floating_point():
        assert x.grad is not None and torch.allclose(x.grad, dx, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [PLAIN, DETACHED, EXACT], ids=["lora", "dora-detached", "dora-exact"])
def test_a_weight_in_a_mix_scales_the_gradients(method: Method) -> None:
    """Under {a: w} every gradient of a is w times that of the change alone, whether rows differ or not."""
    case = CASES["linear"]
    found = []
    for route, factor in (("a", 1.0), ({"a": 0.25}, 0.25), ([{"a": 0.25}, {"a": 0.25}], 0.25)):
        model = case.model(torch.float64)
        bank = attach(model)
        nudge(bank.add("a", method), by=0.4)
        with bank.use(route):
            (model(case.input(torch.float64)) * torch.arange(7)).sum().backward()
        found.append([p.grad / factor for p in bank["a"].parameters() if p.grad is not None])
    assert all(len(grads) == len(found[0]) for grads in found)
    for grads in found[1:]:
        assert all(
            torch.allclose(one, other, rtol=1e-9, atol=1e-11) for one, other in zip(found[0], grads, strict=True)
        )


def test_the_padding_token_gets_no_gradient() -> None:
    """As in the base's own lookup: the row of A that belongs to the padding token stays where it is."""
    case = CASES["embedding-padding"]
    model = case.model()
    bank = attach(model)
    nudge(bank.add("a", PLAIN))
    with bank.use("a"):
        model(torch.tensor([[0, 3, 0, 4]])).sum().backward()
    grad = bank["a"].tensors["layer"]["lora_embedding_A"].grad
    assert grad is not None and grad.abs().sum(0).nonzero().flatten().tolist() == [3, 4]


def test_gradients_add_up_over_calls_of_one_layer() -> None:
    """A layer that runs twice in one forward gets the sum of both gradients."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(torch.tanh(self.layer(x)))
            return out

    for method in (PLAIN, EXACT):
        torch.manual_seed(0)
        model = Twice().double()
        bank = attach(model)
        nudge(bank.add("a", method), by=0.4)
        own = list(bank["a"].parameters())
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

        def output(x: Tensor, *values: Tensor, bank: Bank = bank, model: nn.Module = model) -> Tensor:
            with bank.use("a"):
                result: Tensor = model(x)
            return result

        assert torch.autograd.gradcheck(output, (x, *own))
