"""Experts that are modules of their own, called with the tokens that a router picks: rows of several adapters in one batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.adapters.test_experts import ROWS, moved, out
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from veneer.adapters import Bank, DoRA, LoRA, Route, attach
from veneer.errors import RouteError, TargetError


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8, bias=False), nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))
        return out


class Mixture(nn.Module):
    """Two of four experts for each token, as in the first code of Mixtral; or every chosen pair at once, as in DeepSeek's."""

    def __init__(self, repeated: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.repeated = repeated

    def forward(self, x: Tensor, note: object = None) -> tuple[Tensor, Tensor]:
        batch, length, hidden = x.shape
        flat = x.view(-1, hidden)
        logits = self.gate(flat)
        weight, index = logits.softmax(-1).topk(2)
        if self.repeated:
            pairs, chosen = flat.repeat_interleave(2, 0), index.view(-1)
            found = torch.zeros_like(pairs)
            for number, expert in enumerate(self.experts):
                found[chosen == number] = expert(pairs[chosen == number])
            return (found.view(*index.shape, -1) * weight.unsqueeze(-1)).sum(1).view(x.shape), logits
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            at, place = torch.where(index == number)
            if len(at):
                total = total.index_add(0, at, expert(flat[at]) * weight[at, place, None])
        return total.view(batch, length, hidden), logits


class Model(nn.Module):
    """A layer around the mixture, whose call can be checkpointed."""

    def __init__(self, repeated: bool, checkpointed: bool = False) -> None:
        super().__init__()
        self.up, self.mlp = nn.Linear(8, 8), Mixture(repeated)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        found = checkpoint(self.mlp, h, use_reentrant=False) if self.checkpointed else self.mlp(h)
        assert found[1].shape == (x.shape[0] * x.shape[1], 4)
        total: Tensor = h + found[0]
        return total


def made(
    repeated: bool = False, dtype: torch.dtype = torch.float32, checkpointed: bool = False
) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(repeated, checkpointed).to(dtype), torch.randn(4, 9, 8, dtype=dtype)


def banked(model: nn.Module, **inputs: Any) -> Bank:
    """A bank with a LoRA and a DoRA adapter, both moved."""
    bank = attach(model, **inputs)
    for number, (name, method) in enumerate((("lora", LoRA(r=3)), ("dora", DoRA(r=2)))):
        bank.add(name, method, seed=number)
        moved(bank, name, number)
    return bank


@pytest.mark.parametrize("repeated", [False, True])
def test_mixed_rows_are_those_of_merged_experts(repeated: bool) -> None:
    """Rows of the base, of LoRA, of DoRA and of a mix are those of merged models, by rows of a batch and by flat tokens."""
    model, x = made(repeated)
    bank = banked(model, example={"x": x})
    assert {site.layout for name, site in bank.sites.items() if ".experts." in name} == {"constant"}
    assert not any("gate" in name for name in bank["lora"].tensors) and "mlp.experts.3.w2" in bank["lora"].tensors
    flat = Route.tokens(ROWS, torch.arange(36) // 9)
    with torch.no_grad():
        with bank.use(ROWS):
            found = model(x)
        with bank.use(flat):
            in_a_row = model(x.view(1, 36, 8)).view(x.shape)
            every_token = model(x)
        for row, route in enumerate(ROWS):
            dense, _ = made(repeated)
            dense.load_state_dict(bank.merged_state_dict(route))
            reference = dense(x)[row]
            for one in (found, in_a_row, every_token):
                assert (one[row] - reference).norm() <= 1e-6 * reference.norm()


def test_tokens_of_a_row_take_different_mixes() -> None:
    """A route token by token holds where the tokens of a row differ."""
    model, x = made()
    bank = banked(model, example={"x": x})
    index = torch.arange(36) % 3
    with torch.no_grad():
        expected = []
        for route in ("lora", None, "dora"):
            with bank.use(route):
                expected.append(model(x).view(36, 8))
        with bank.use(Route.tokens(["lora", None, "dora"], index)):
            found = model(x).view(36, 8)
    assert torch.allclose(found, torch.stack(expected)[index, torch.arange(36)], atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_each_adapter_alone(checkpointed: bool) -> None:
    """Gradients of a mixed batch are those that autograd derives from dense weights, row by row, also where blocks run again."""
    model, x = made(dtype=torch.float64, checkpointed=checkpointed)
    bank = banked(model, example={"x": x})
    weights, sample = torch.randn_like(x), x.clone().requires_grad_()
    with bank.use(["lora", "dora", None, "lora"]):
        found = model(sample)
    found.mul(weights).sum().backward()
    grads = {name: [p.grad for p in bank.parameters(name)] for name in ("lora", "dora")}
    for name, rows in (("lora", [0, 3]), ("dora", [1])):
        dense, part = dict(model.named_parameters()), x[rows].clone().requires_grad_()
        for site, held in bank[name].tensors.items():
            weight = bank.sites[site].weight_2d
            changed = weight + bank[name].scale(site) * held["lora_B"] @ held["lora_A"]
            if "lora_magnitude_vector" in held:
                changed = changed * (held["lora_magnitude_vector"] / changed.detach().norm(dim=1)).unsqueeze(1)
            dense[f"{site}.weight"] = changed
        plain, _ = made(dtype=torch.float64)
        loss = (functional_call(plain, dense, (part,)) * weights[rows]).sum()
        expected = torch.autograd.grad(loss, [part, *bank.parameters(name)], allow_unused=True)
        assert sample.grad is not None
        for one, other in zip([sample.grad[rows], *grads[name]], expected, strict=True):
            # An expert that none of the tokens went to has no gradient.
            assert (one is None and other is None) or (one - other).norm() <= 1e-9 * (1 + other.norm())


def test_nan_stays_in_its_row() -> None:
    """NaN in one row reaches neither the other rows nor the gradients of their adapters."""
    model, x = made()
    bank = banked(model, example={"x": x})
    route = ["lora", "dora", None, "dora"]
    x[0] = float("nan")
    with bank.use(route):
        found = model(x)
    found[1:].sum().backward()
    assert torch.isnan(found[0]).all() and not torch.isnan(found[1:]).any()
    assert all(p.grad is None or not torch.isnan(p.grad).any() for p in bank.parameters("dora"))


def test_a_dropout_mask_is_the_same_in_company() -> None:
    """An adapter's rows drop the same values alone and beside others."""
    found = []
    for route in (["a", "a", None, None], ["a", "a", "b", "b"]):
        model, x = made()
        bank = attach(model, example={"x": x})
        for name in ("a", "b"):
            bank.add(name, LoRA(lora_dropout=0.3), seed=1)
            moved(bank, name, 2)
        with bank.use(route, training=True):
            found.append(model(x)[:2])
        with bank.use(route, training=False):
            assert not torch.allclose(model(x)[:2], found[-1])
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_what_cannot_be_divided_into_rows_is_refused() -> None:
    """An argument without rows is an error under a route of several mixes, and none where one mix holds for all."""
    torch.manual_seed(0)
    block, x = Mixture(), torch.randn(4, 3, 8)
    bank = banked(block, example={"x": x})
    with bank.use("lora"):
        block(x, note=object())
    with pytest.raises(RouteError, match="the model holds experts and is given an object of type dict"), bank.use(ROWS):
        block(x, note={})
    with pytest.raises(RouteError, match="is given a tensor of 5 x 2"), bank.use(ROWS):
        block(x, note=torch.ones(5, 2))
    with bank.use(ROWS):
        assert torch.equal(out(block(x, note=(x, 1))), out(block(x)))


def test_the_model_is_restored() -> None:
    """The last adapter of a mixture takes the change of its forward along."""
    model, x = made()
    expected = model(x)
    bank = attach(model, example={"x": x})
    for name, targets in (("a", ("w1", "up")), ("b", ("w2",)), ("c", ("up",))):
        bank.add(name, LoRA(target_modules=targets))
    assert "forward" in model.mlp.__dict__
    copied = copy.deepcopy(model)
    bank.remove("b")
    with bank.use(["a", "c", None, "a"]):
        assert torch.allclose(model(x), expected, atol=1e-6)
    bank.remove("a")
    assert "forward" not in model.mlp.__dict__ and "forward" in model.up.__dict__
    bank.detach()
    assert torch.equal(copied(x), expected) and "forward" in copied.mlp.__dict__


def test_switch_transformers() -> None:
    """Experts that the dry run did not reach are adapted too, routers only when named, and mixed rows are those of merged models."""
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2, num_experts=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=4, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    plain = copy.deepcopy(model)
    bank = banked(model)
    assert sum(".experts." in name for name in bank["lora"].tensors) == 2 * 3 * 2
    assert not any("router" in name for name in bank["lora"].tensors)
    ids = torch.randint(1, 64, (4, 7))
    with torch.no_grad(), bank.use(ROWS):
        found = model(input_ids=ids, decoder_input_ids=ids).logits
        bank.model.generate(ids, max_new_tokens=3)
    for row, route in enumerate(ROWS):
        plain.load_state_dict(bank.merged_state_dict(route))
        with torch.no_grad():
            reference = plain(input_ids=ids, decoder_input_ids=ids).logits[row]
        # Rounding of the whole model.
        assert (found[row] - reference).norm() <= 5e-6 * reference.norm()


def test_an_expert_that_nothing_calls_is_refused() -> None:
    """Experts of a mixture that the model never calls cannot be adapted by name."""
    model, x = made()
    model.spare = Mixture()  # type: ignore[assignment]
    bank = attach(model, example={"x": x})
    with pytest.raises(TargetError, match=r"spare.experts.0.w1, which cannot be adapted: the layer was not called"):
        bank.add("a", LoRA(target_modules=("spare.experts.*.w1",)))
