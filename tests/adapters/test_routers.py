"""Routers that also choose the experts: their scores are adapted where a pattern names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.adapters.test_experts import ROWS, block_of, check_merged_rows, dense_weights, inputs, moved, out
from tests.tiny import tiny
from torch import Tensor, nn
from torch.func import functional_call

import veneer
from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.errors import TargetError

ARCHS = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4")
every_arch = pytest.mark.parametrize("arch", ARCHS)
ROUTER = "re:gate|router"


def banked(block: nn.Module, x: Tensor) -> Bank:
    """A bank with a LoRA and a DoRA adapter on the router alone, both moved."""
    bank = attach(block, example={"hidden_states": x})
    bank.add("lora", LoRA(r=4, target_modules=(ROUTER,)), seed=1)
    bank.add("dora", DoRA(r=2, target_modules=(ROUTER,)), seed=2)
    moved(bank, "lora", 3)
    moved(bank, "dora", 4)
    return bank


@every_arch
def test_mixed_rows_are_those_of_merged_routers(arch: str) -> None:
    """Rows of the base, of LoRA, of DoRA and of a mix are those of merged routers within 1e-6; without the bank no bit has changed."""
    block, x = block_of(arch), inputs()
    expected = out(block(x)).view(4, 24, -1)
    bank = banked(block, x)
    assert len(bank["lora"].tensors) == 1
    with torch.no_grad(), bank.use(ROWS):
        found = out(block(x)).view(4, 24, -1)
    assert (found[1] - expected[1]).abs().max() <= 1e-6 and not torch.allclose(found[0], expected[0], atol=1e-3)
    check_merged_rows(arch, bank, x, found)
    bank.detach()
    assert torch.equal(out(block(x)).view(4, 24, -1), expected)


@every_arch
def test_gradients_are_those_of_dense_routers(arch: str) -> None:
    """Gradients of a router's factors and of the input are those that autograd derives from a dense weight."""
    block, x = block_of(arch).double(), inputs(torch.float64)
    if arch != "llama4":
        block.experts.config._experts_implementation = "eager"  # type: ignore[union-attr]
    bank = banked(block, x)
    weights = torch.randn(24, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for row, name in ((0, "lora"), (2, "dora")):
        tensors, sample = list(bank.parameters(name)), x[row : row + 1].clone().requires_grad_()
        with bank.use([name, None]):
            found = out(block(torch.cat([sample, x[1:2]]))).view(2, 24, -1)[0]
        grads = torch.autograd.grad((found * weights).sum(), [sample, *tensors])
        values = dense_weights(bank, [name])
        bank.detach()
        reference = out(functional_call(block, values, (sample,))).view(24, -1)
        expected = torch.autograd.grad((reference * weights).sum(), [sample, *tensors])
        for one, other in zip(grads, expected, strict=True):
            # Some routers compute in float32 whatever the model's type is.
            assert other.norm() > 0 and (one - other).norm() <= 1e-5 * other.norm()
        bank = banked(block, x)


def test_a_new_adapter_changes_no_bit_and_dropout_is_the_rows_own() -> None:
    """Until it is trained an adapter leaves every score as it is; the masks of a row are the same in company."""
    block, x = block_of("mixtral"), inputs()
    expected = block(x)
    bank = attach(block, example={"hidden_states": x})
    bank.add("l", LoRA(target_modules=(ROUTER,)))
    bank.add("d", DoRA(target_modules=(ROUTER,), lora_dropout=0.5))
    with bank.use(["l", "d", None, "l"], training=False):
        assert torch.equal(block(x), expected)
    moved(bank, "d", 1)
    found = []
    for route in (["d", None, None, None], ["d", "l", "l", "l"]):
        bank["d"].draws = 0
        with bank.use(route, training=True):
            found.append(block(x)[0])
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_routers_of_bf16_bases_keep_small_changes() -> None:
    """A change that is lost in bf16's rounding of the weight acts on the scores: factors are not merged into the weight."""
    block, x = block_of("deepseek_v3").bfloat16(), inputs(torch.bfloat16)
    bank = attach(block, example={"hidden_states": x})
    adapter = bank.add("a", LoRA(r=1, lora_alpha=1, target_modules=(ROUTER,)))
    factors = adapter.tensors["gate"]
    factors["lora_A"].data.fill_(1e-5)
    factors["lora_B"].data.fill_(1.0)
    scores: list[Tensor] = []
    block.gate.register_forward_hook(lambda module, args, result: scores.append(result[0]))  # type: ignore[operator]
    for route in (None, "a"):
        with bank.use(route):
            block(x)
    change = 1e-5 * x.float().view(-1, 32).sum(1, keepdim=True)
    assert torch.allclose(scores[1] - scores[0], change.expand(-1, 4), atol=2e-6)


def test_all_linear_leaves_routers_out() -> None:
    """all-linear takes no router."""
    bank = attach(block_of("qwen3_moe"), example={"hidden_states": inputs()})
    assert bank.sites["gate"].is_router and "gate" not in bank.uncovered
    assert "gate" not in bank.add("a", LoRA()).tensors


def test_a_router_of_another_product_is_refused() -> None:
    """A router whose scores are no F.linear of its weight says so where a pattern names it."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 32))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = x.view(-1, 32) @ self.weight.T
            score, index = logits.softmax(-1).topk(2)
            return logits, score, index

    block = block_of("qwen3_moe")
    block.gate = Router()
    bank = attach(block, example={"hidden_states": inputs()})
    with pytest.raises(TargetError, match=r"gate, which cannot be adapted: its scores are not one F\.linear"):
        bank.add("a", LoRA(target_modules=(ROUTER,)))


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3"])
def test_a_folder_with_a_router_is_read_back(arch: str, tmp_path: Path) -> None:
    """A saved adapter of routers and attention is read with the same logits."""
    model, ids = tiny(arch), torch.arange(3, 15).view(2, 6)
    bank = veneer.attach(model)
    bank.add("a", LoRA(r=2, target_modules=("re:.*mlp.gate", "o_proj")))
    assert any(name.endswith("mlp.gate") for name in bank["a"].tensors)
    moved(bank, "a", 1)
    with torch.no_grad(), bank.use("a"):
        expected = model(ids).logits
    bank.save("a", tmp_path / "a")
    bank.remove("a")
    bank.load(tmp_path / "a", name="b")
    with torch.no_grad(), bank.use("b"):
        assert torch.equal(model(ids).logits, expected)
