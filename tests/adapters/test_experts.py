"""Stacked experts: adapters per expert against dense references, alone and in mixed batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.tiny import tiny
from torch import Tensor, nn
from torch.func import functional_call

from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.errors import AdapterError, TargetError

ARCHS = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "llama4")
every_arch = pytest.mark.parametrize("arch", ARCHS)
ROWS: list[Any] = ["lora", None, "dora", {"lora": 0.7, "dora": -0.4}]


def block_of(arch: str, **fields: Any) -> nn.Module:
    """The last mixture block of a tiny model: router, experts, shared experts."""
    layer = tiny(arch, **fields).model.layers[-1]
    block: nn.Module = layer.feed_forward if arch == "llama4" else layer.mlp
    return block.eval()


def moved(bank: Bank, name: str, seed: int) -> None:
    """Move every tensor of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    for _, key, tensor in bank[name].named_tensors():
        size = 0.1 * tensor.detach().abs().mean() if key == "lora_magnitude_vector" else 0.15
        tensor.data += size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def banked(block: nn.Module, x: Tensor) -> Bank:
    """A bank with one LoRA and one DoRA adapter, both moved."""
    bank = attach(block, example={"hidden_states": x})
    bank.add("lora", LoRA(r=4), seed=1)
    bank.add("dora", DoRA(r=6), seed=2)
    moved(bank, "lora", 3)
    moved(bank, "dora", 4)
    return bank


def out(found: Any) -> Tensor:
    """The hidden states that a block returns, alone or first of a tuple."""
    tensor: Tensor = found[0] if isinstance(found, tuple) else found
    return tensor


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(5)).to(dtype)


@every_arch
def test_mixed_rows_are_those_of_dense_experts(arch: str) -> None:
    """Rows of the base, of LoRA, of DoRA and of a mix are those of a block whose experts hold the merged weights."""
    block, x = block_of(arch), inputs()
    expected = out(block(x))
    bank = banked(block, x)
    assert any(site.stack for site in bank.sites_of("lora"))
    with torch.no_grad(), bank.use(ROWS):
        found = out(block(x)).view(4, 24, -1)
    assert torch.equal(found[1], expected.view(4, 24, -1)[1])
    check_merged_rows(arch, bank, x, found)
    bank.detach()
    assert torch.equal(out(block(x)), expected)


def check_merged_rows(arch: str, bank: Bank, x: Tensor, found: Tensor) -> None:
    """Each row of ``found`` [4, 24, ...] is that of a block with the merged weights of its route."""
    for row, route in enumerate(ROWS):
        dense = block_of(arch)
        dense.load_state_dict(bank.merged_state_dict(route))
        reference = out(dense(x)).view(4, 24, -1)[row]
        assert (found[row] - reference).norm() <= 1e-6 * reference.norm()


def dense_weights(bank: Bank, names: list[str]) -> dict[str, Tensor]:
    """The block's parameters with the adapters' changes, differentiable in their tensors; DoRA's norm is a constant."""
    values: dict[str, Tensor] = dict(bank.model.named_parameters())
    stacks = {name: list(value.unbind(0)) for name, value in values.items() if value.dim() == 3}
    for name, site in bank.sites.items():
        weight = site.weight_2d
        for one in names:
            held = bank[one].tensors.get(name)
            if held is None:
                continue
            changed = weight + bank[one].scale(name) * held["lora_B"] @ held["lora_A"]
            if "lora_magnitude_vector" in held:
                changed = changed * (held["lora_magnitude_vector"] / changed.detach().norm(dim=1)).unsqueeze(1)
            weight = changed
        if site.stack is None:
            values[f"{name}.weight"] = weight
            continue
        key = f"{site.stack.name}.{site.module.part.parameter}"  # type: ignore[union-attr]
        whole = torch.stack(stacks[key])
        mask = torch.zeros_like(whole)
        site.module.view_of(mask).fill_(1.0)  # type: ignore[operator]
        spread = torch.zeros_like(whole)
        place = site.module.view_of(torch.arange(whole.numel()).view(whole.shape))  # type: ignore[operator]
        spread = spread.flatten().index_copy(0, place.flatten(), weight.flatten()).view(whole.shape)
        stacks[key] = list((whole * (1 - mask) + spread).unbind(0))
    return values | {name: torch.stack(parts) for name, parts in stacks.items()}


@every_arch
def test_gradients_are_those_of_dense_experts(arch: str) -> None:
    """Gradients of every tensor and of the input are those that autograd derives from dense weights of every expert."""
    block = block_of(arch).double()
    if arch != "llama4":
        block.experts.config._experts_implementation = "eager"  # type: ignore[union-attr]
    x = inputs(torch.float64)
    bank = banked(block, x)
    weights = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for row, name in ((0, "lora"), (2, "dora")):
        tensors, sample = list(bank.parameters(name)), x[row : row + 1].clone().requires_grad_()
        with bank.use([name, None]):
            found = out(block(torch.cat([sample, x[1:2]]))).view(2, 24, -1)[0]
        grads = torch.autograd.grad((found * weights[row]).sum(), [sample, *tensors], allow_unused=True)
        values = dense_weights(bank, [name])
        bank.detach()
        reference = out(functional_call(block, values, (sample,))).view(1, 24, -1)[0]
        expected = torch.autograd.grad((reference * weights[row]).sum(), [sample, *tensors], allow_unused=True)
        for one, other in zip(grads, expected, strict=True):
            one = torch.zeros_like(other) if one is None else one
            assert (one - other).norm() <= 1e-9 * (1 + other.norm())
        bank = banked(block, x)


@every_arch
def test_a_new_adapter_on_experts_changes_no_bit(arch: str) -> None:
    """Until it is trained an adapter leaves every token's bits as they are."""
    block, x = block_of(arch), inputs()
    expected = out(block(x))
    bank = attach(block, example={"hidden_states": x})
    bank.add("l", LoRA())
    bank.add("d", DoRA())
    for route in ("l", "d", ["l", "d", None, "l"]):
        with bank.use(route):
            assert torch.equal(out(block(x)), expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_base_rows_keep_their_bits(implementation: str) -> None:
    """In a mixed batch rows of the base keep the bits of the implementation that the model is set to, in fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        block, x = block_of("qwen3_moe", num_experts_per_tok=3).to(dtype), inputs(dtype)
        block.experts.config._experts_implementation = implementation  # type: ignore[union-attr]
        expected = out(block(x))
        bank = banked(block, x)
        with bank.use(["lora", None, "dora", None]):
            found = out(block(x))
        assert torch.equal(found[1::2], expected[1::2])
        assert not torch.equal(found[0], expected[0])


def test_nan_stays_in_its_row() -> None:
    """NaN in one row, or in one adapter, reaches no other row."""
    for arch in ARCHS:
        block, x = block_of(arch), inputs()
        bank = banked(block, x)
        with torch.no_grad(), bank.use(ROWS):
            expected = out(block(x)).view(4, 24, -1)
            bank["lora"].tensors["experts.0.up_proj"]["lora_B"].fill_(float("nan"))
            broken = out(block(x)).view(4, 24, -1)
        assert torch.isnan(broken[0]).any() and torch.equal(broken[1:3], expected[1:3])


def test_an_experts_share_of_the_rank() -> None:
    """An expert has its share of the rank, at least 1, and a pattern overrules it; shared experts have all of it."""
    block, x = block_of("deepseek_v3"), inputs()
    bank = attach(block, example={"hidden_states": x})
    adapter = bank.add("a", LoRA(r=7, rank_pattern={"*.1.up_proj": 5}))
    assert adapter.rank("experts.0.gate_proj") == 3 and adapter.rank("experts.1.up_proj") == 5
    assert adapter.rank("shared_experts.gate_proj") == 7
    assert bank.add("b", LoRA(r=1)).rank("experts.0.down_proj") == 1


def test_routers_only_when_named() -> None:
    """all-linear covers experts and leaves out a linear router, which a pattern can name."""

    class Router(nn.Linear):
        pass

    block, x = block_of("qwen3_moe"), inputs()
    block.scores = Router(32, 4, bias=False)
    bank = attach(block, example={"hidden_states": x})
    with pytest.raises(TargetError, match="was not called"):
        bank.add("named", LoRA(target_modules=("scores",)))
    assert not any("scores" in name for name in bank.add("all", LoRA()).tensors)
    assert len(bank["all"].tensors) == 12


def test_a_part_of_a_fused_weight_is_adapted_by_name() -> None:
    """gate_proj alone of a fused gate_up_proj is adapted, in halves and interleaved."""
    for arch in ("mixtral", "gpt_oss"):
        block, x = block_of(arch), inputs()
        base = copy.deepcopy(block.experts.gate_up_proj.data)
        bank = attach(block, example={"hidden_states": x})
        adapter = bank.add("a", LoRA(r=4, target_modules=("gate_proj",)))
        assert set(adapter.tensors) == {f"experts.{e}.gate_proj" for e in range(4)}
        moved(bank, "a", 1)
        merged = bank.merged_state_dict("a")["experts.gate_up_proj"]
        changed = (merged != base).any(0).any(1 if arch == "mixtral" else 0)
        half = torch.zeros_like(changed)
        half[slice(0, len(half) // 2) if arch == "mixtral" else slice(0, None, 2)] = True
        assert torch.equal(changed, half)


def test_dropout_of_an_expert_is_the_same_in_company() -> None:
    """The masks of an adapter depend on its own tokens: its rows drop the same values alone and beside others."""
    found = []
    for route in (["a", None, None, None], ["a", "b", "b", "b"]):
        block, x = block_of("qwen3_moe"), inputs()
        bank = attach(block, example={"hidden_states": x})
        for name in ("a", "b"):
            bank.add(name, LoRA(lora_dropout=0.3), seed=1)
            moved(bank, name, 2)
        with bank.use(route, training=True):
            found.append(out(block(x))[0])
        with bank.use(route, training=False):
            assert not torch.allclose(out(block(x))[0], found[-1])
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_tokens_of_each_expert_are_counted() -> None:
    """An adapter counts the tokens that each expert was trained on, and not those of a call without gradients."""
    block, x = block_of("olmoe"), inputs()
    bank = banked(block, x)
    with torch.no_grad(), bank.use("lora"):
        block(x)
    assert bank["lora"].expert_tokens["experts"].sum() == 0
    with bank.use(["lora", None, "dora", None]):
        block(x)
    assert bank["lora"].expert_tokens["experts"].sum() == 24 * 2
    assert bank["lora"].tokens_at("experts.0.up_proj") == int(bank["lora"].expert_tokens["experts"][0])
    assert bank["lora"].tokens_at("mlp.up_proj") is None


def test_overrides_of_experts_are_refused() -> None:
    """Biases and whole weights of stacked experts cannot be trained, and the error names them."""
    block, x = block_of("gpt_oss"), inputs()
    bank = attach(block, example={"hidden_states": x})
    with pytest.raises(TargetError, match="parameters of stacked experts cannot be trained"):
        bank.add("a", LoRA(bias="lora_only"))
    with pytest.raises((TargetError, AdapterError), match="stacked experts"):
        bank.add("a", LoRA(lora_bias=True))


def test_removing_the_last_adapter_restores_the_stack() -> None:
    """An adapter that leaves takes its patches along, at some experts before others."""
    block, x = block_of("mixtral"), inputs()
    bank = attach(block, example={"hidden_states": x})
    bank.add("a", LoRA(target_modules=("experts.0.up_proj",)))
    bank.add("b", LoRA(target_modules=("down_proj",)))
    moved(bank, "b", 1)
    bank.remove("a")
    assert "forward" in block.experts.__dict__
    with bank.use("b"):
        assert not torch.equal(out(block(x)), out(block_of("mixtral")(x)))
    bank.remove("b")
    assert "forward" not in block.experts.__dict__


def test_a_stack_and_a_fused_parameter_name_their_parts() -> None:
    """The names of the stack and of its parameters, as PEFT's target_parameters have them, choose the parts of every expert."""
    block, x = block_of("mixtral"), inputs()
    bank = attach(block, example={"hidden_states": x})
    both = bank.add("a", LoRA(target_modules=("experts.gate_up_proj",))).tensors
    assert {name.rpartition(".")[2] for name in both} == {"gate_proj", "up_proj"} and len(both) == 8
    assert len(bank.add("b", LoRA(target_modules=("experts",))).tensors) == 12
    few = bank.add("c", LoRA(target_modules=("experts",), exclude_modules=("experts.gate_up_proj",))).tensors
    assert len(few) == 4


def test_a_shared_factor_on_the_hidden_side() -> None:
    """With shared_outer the experts of a stack train one A of gate_proj and up_proj each, and one B of down_proj."""
    block, x = block_of("qwen3_moe"), inputs()
    bank = attach(block, example={"hidden_states": x})
    adapter = bank.add("a", DoRA(r=4, shared_outer=True, loraplus_lr_ratio=4.0))
    for part, key in (("gate_proj", "lora_A"), ("up_proj", "lora_A"), ("down_proj", "lora_B")):
        assert len({id(adapter.tensors[f"experts.{e}.{part}"][key]) for e in range(4)}) == 1
        other = "lora_B" if key == "lora_A" else "lora_A"
        assert len({id(adapter.tensors[f"experts.{e}.{part}"][other]) for e in range(4)}) == 4
    assert len(bank.parameters("a")) == 3 * (1 + 4 + 4)
    torch.optim.SGD(bank.parameter_groups("a", 0.1))
    moved(bank, "a", 1)
    x.requires_grad_()
    with bank.use("a"):
        found = out(block(x))
    dense = block_of("qwen3_moe")
    dense.load_state_dict(bank.merged_state_dict("a"))
    assert (found - out(dense(x))).norm() <= 1e-6 * found.norm()
    found.square().sum().backward()
    grad = adapter.tensors["experts.0.gate_proj"]["lora_A"].grad
    assert grad is not None and grad.abs().max() > 0
