"""What every method must hold on every kind of layer and in every precision."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tests.adapters.made import CASES, DTYPES, METHODS, Case, bits, merged_model, nudge, portrait, values
from torch import Tensor, nn

from veneer.adapters import Bank, DoRA, LoRA, attach

ALL = pytest.mark.parametrize(
    ("method", "case", "dtype"),
    [
        pytest.param(METHODS[m], CASES[c], DTYPES[d], id=f"{m}-{c}-{d}")
        for m, c, d in itertools.product(METHODS, CASES, DTYPES)
    ],
)
FP32 = pytest.mark.parametrize(
    ("method", "case"),
    [pytest.param(METHODS[m], CASES[c], id=f"{m}-{c}") for m, c in itertools.product(METHODS, CASES)],
)
MERGE_LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def built(method: LoRA | DoRA, case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Bank, Tensor]:
    model = case.model(dtype)
    bank = attach(model)
    bank.add("a", method, seed=3)
    return model, bank, case.input(dtype)


@ALL
def test_a_new_adapter_changes_no_bit(method: LoRA | DoRA, case: Case, dtype: torch.dtype) -> None:
    """Until it is trained an adapter leaves the output as it is to the bit, with gradients on and off."""
    model, bank, x = built(method, case, dtype)
    expected = case.model(dtype)(x)
    with bank.use("a"):
        found = model(x)
        with torch.no_grad():
            quiet = model(x)
    assert torch.equal(bits(found), bits(expected))
    assert torch.equal(bits(quiet), bits(expected))


@ALL
def test_a_moved_adapter_changes_the_output_and_nothing_else(
    method: LoRA | DoRA, case: Case, dtype: torch.dtype
) -> None:
    """After a nudge the output differs under the adapter, is the base's without it, and the base's values are untouched."""
    model, bank, x = built(method, case, dtype)
    before, expected = values(model), model(x)
    nudge(bank["a"])
    with bank.use("a"):
        changed = model(x)
    assert (changed - expected).abs().max() > 1e-2
    assert changed.dtype == expected.dtype and changed.shape == expected.shape
    assert torch.equal(bits(model(x)), bits(expected))
    with bank.use(None):
        assert torch.equal(bits(model(x)), bits(expected))
    assert values(model) == before


@ALL
def test_merged_is_adapted(method: LoRA | DoRA, case: Case, dtype: torch.dtype) -> None:
    """A plain model with the merged weights computes what the adapted one does."""
    model, bank, x = built(method, case, dtype)
    nudge(bank["a"])
    with bank.use("a"), torch.no_grad():
        expected = model(x)
    found = merged_model(bank, "a")(x)
    assert (found - expected).norm() <= MERGE_LIMIT[dtype] * expected.norm()


@ALL
def test_the_first_step_moves_the_zero_factor_alone(method: LoRA | DoRA, case: Case, dtype: torch.dtype) -> None:
    """At the start one factor is zero, so the other's gradient is zero; only the adapter's own tensors get gradients, in fp32 or wider."""
    model, bank, x = built(method, case, dtype)
    with bank.use("a"):
        model(x).float().square().sum().backward()
    own = {key: p for tensors in bank["a"].tensors.values() for key, p in tensors.items()}
    still, moving = ("lora_embedding_B", "lora_embedding_A") if "lora_embedding_A" in own else ("lora_A", "lora_B")
    assert own[still].grad is not None and own[still].grad.abs().max() == 0
    assert own[moving].grad is not None and own[moving].grad.abs().max() > 0
    if isinstance(method, DoRA):
        magnitude = own["lora_magnitude_vector"]
        assert magnitude.grad is not None and magnitude.grad.abs().max() > 0
    wide = torch.promote_types(dtype, torch.float32)
    assert all(p.dtype == wide and p.grad is not None and p.grad.dtype == wide for p in own.values())
    assert all(p.grad is None for p in model.parameters())


@FP32
def test_gradients_reach_the_input(method: LoRA | DoRA, case: Case) -> None:
    """The gradient of the input is that of the merged layer."""
    if case.vocabulary:
        pytest.skip("token ids have no gradient")
    model, bank, x = built(method, case, torch.float64)
    nudge(bank["a"])
    grads = []
    with bank.use("a"):
        for one in (model, merged_model(bank, "a")):
            leaf = x.clone().requires_grad_()
            one(leaf).square().sum().backward()
            grads.append(leaf.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-9, atol=1e-11)


@FP32
def test_detaching_leaves_no_trace(method: LoRA | DoRA, case: Case) -> None:
    """Attach, add, train, remove and detach leave values, names, classes, attributes, hooks, modes and flags as they were."""
    model = case.model()
    x = case.input()
    model.layer.register_forward_hook(lambda module, args, output: None)
    next(model.parameters()).requires_grad_(False)
    before, expected = portrait(model), model(x)
    bank = attach(model)
    assert portrait(model) == before
    bank.add("a", method)
    bank.add("b", method)
    with bank.use("a"):
        model(x).sum().backward()
    bank.remove("a")
    assert portrait(model) != before
    bank.remove("b")
    assert portrait(model) == before
    bank.add("c", method)
    bank.detach()
    assert portrait(model) == before
    assert torch.equal(bits(model(x)), bits(expected))


@FP32
def test_one_of_two_leaves_and_the_other_stays(method: LoRA | DoRA, case: Case) -> None:
    """Removing an adapter changes nothing for the one beside it."""
    model, bank, x = built(method, case)
    nudge(bank["a"])
    with bank.use("a"):
        expected = model(x)
    nudge(bank.add("b", method, seed=9), seed=9)
    bank.remove("b")
    assert bank.names == ["a"]
    with bank.use("a"):
        assert torch.equal(bits(model(x)), bits(expected))


@FP32
def test_dtype_of_the_base_may_change(method: LoRA | DoRA, case: Case) -> None:
    """Casting an attached model casts the base; the adapter's masters stay, and the output is near the wide one."""
    model, bank, x = built(method, case)
    nudge(bank["a"], by=0.1)
    with bank.use("a"):
        wide = model(x)
    model.to(torch.float64)
    with bank.use("a"):
        widest = model(x if case.vocabulary else x.double())
    assert widest.dtype == torch.float64
    assert (widest - wide).norm() <= 1e-5 * wide.norm()
    model.to(torch.bfloat16)
    with bank.use("a"):
        narrow = model(x if case.vocabulary else x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).norm() <= 3e-2 * wide.norm()
    assert all(p.dtype == torch.float32 for p in bank["a"].parameters())


@FP32
def test_weighted_mixes_are_sums_of_changes(method: LoRA | DoRA, case: Case) -> None:
    """Under a mix the output is the base's plus the weighted changes of each adapter, and so is the merged weight."""
    model, bank, x = built(method, case, torch.float64)
    other = DoRA(r=2, target_modules="layer") if isinstance(method, LoRA) else LoRA(r=2, target_modules="layer")
    bank.add("b", other, seed=5)
    nudge(bank["a"])
    nudge(bank["b"], seed=8)
    base = model(x)
    parts = {}
    for name in "ab":
        with bank.use(name):
            parts[name] = model(x) - base
    with bank.use({"a": 0.7, "b": -1.5}):
        found = model(x)
    assert torch.allclose(found, base + 0.7 * parts["a"] - 1.5 * parts["b"], rtol=1e-10, atol=1e-10)
    assert torch.allclose(merged_model(bank, {"a": 0.7, "b": -1.5})(x), found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["conv2d-stride", "conv2d-reflect", "linear-one-vector", "embedding"])
def test_an_empty_batch_passes(name: str) -> None:
    """A batch of no rows comes out as the base would give it."""
    case = CASES[name]
    model, bank, x = built(METHODS["dora"], case)
    nudge(bank["a"])
    empty = x[None][:0] if name == "linear-one-vector" else x[:0]
    with bank.use("a"):
        assert model(empty).shape == case.model()(empty).shape


@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding"])
def test_a_row_of_zeros_stays_finite(name: str) -> None:
    """DoRA on a weight with an output of zeros: the first output is the base's, values and gradients are finite afterwards."""
    case = CASES[name]
    for exact in (False, True):
        model = case.model()
        weight = model.layer.weight
        with torch.no_grad():
            (weight[:, 2] if name != "linear" else weight[2]).zero_()
        expected = model(case.input())
        bank = attach(model)
        bank.add("a", DoRA(r=2, target_modules="layer", exact_norm_gradient=exact))
        with bank.use("a"):
            found = model(case.input())
            found.square().sum().backward()
        assert torch.equal(found, expected)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in bank["a"].parameters())
        adapter, weight_2d = bank["a"], bank.survey.sites["layer"].weight_2d
        parts = adapter.method.delta_parts(adapter.tensors["layer"], 1.0, weight_2d)
        assert all(part.isfinite().all() for part in parts[:3] if part is not None)
        nudge(bank["a"])
        with bank.use("a"):
            assert model(case.input()).isfinite().all()


def test_autocast_takes_the_norm_in_full_precision() -> None:
    """Under bf16 autocast the norm is the one of fp32, so an untrained DoRA adapter still changes no bit and a trained one little."""
    case = CASES["linear"]
    model, bank, x = built(METHODS["dora"], case)
    with torch.autocast("cpu", torch.bfloat16):
        expected = case.model()(x)
        with bank.use("a"):
            assert torch.equal(bits(model(x)), bits(expected))
    nudge(bank["a"], by=0.05)
    norms = []
    method = bank["a"].method
    site = bank.sites["layer"]
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            own: dict[str, Tensor] = dict(bank["a"].tensors["layer"])
            norms.append(method.norm(own, site.weight_2d, site.squared_norms(), 2.0))
    assert torch.equal(norms[0], norms[1])


def test_inference_mode_first_and_training_after() -> None:
    """What a first run in inference mode caches does not stand in the way of training."""
    model, bank, x = built(DoRA(r=2, target_modules="layer", exact_norm_gradient=True), CASES["linear"])
    bank.sites["layer"]._squared = None
    with torch.inference_mode(), bank.use("a"):
        model(x)
    with bank.use("a"):
        model(x).sum().backward()
    assert all(p.grad is not None for p in bank["a"].parameters())


def test_norms_follow_the_base_weight() -> None:
    """||W||^2 is computed again where the base's weight is changed in place, replaced or cast."""
    model, bank, x = built(METHODS["dora"], CASES["linear"])
    site = bank.sites["layer"]
    first = site.squared_norms()
    assert site.squared_norms() is first
    with torch.no_grad():
        model.layer.weight.mul_(2)
    assert torch.allclose(site.squared_norms(), 4 * first)
    model.to(torch.float64)
    assert site.squared_norms().dtype == torch.float64
    copied = copy.deepcopy(model)
    assert torch.equal(copied.layer.forward.site.squared_norms(), site.squared_norms())
