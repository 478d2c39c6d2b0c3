"""Faster elementwise chains on whole models: the same numbers, put on and taken off without a trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.tiny import tiny
from torch import nn

from veneer.adapters import LoRA, attach
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.state import quantize
from veneer.models.fast_modules import fast_modules, restore_forwards, use_fast_forwards

IDS = torch.arange(24).reshape(4, 6) % 60 + 1

# What each architecture's two layers offer: norms (with those of queries and keys), gated feed-forwards, attention with rotary halves.
OFFERS = {
    "llama": {"norm": 5, "gated": 2, "gelu": 0, "rotary": 2},
    "mistral": {"norm": 5, "gated": 2, "gelu": 0, "rotary": 2},
    "qwen3": {"norm": 9, "gated": 2, "gelu": 0, "rotary": 2},
    "gemma2": {"norm": 9, "gated": 2, "gelu": 0, "rotary": 2},
    "gemma3": {"norm": 13, "gated": 2, "gelu": 0, "rotary": 2},
    "gpt2": {"norm": 0, "gated": 0, "gelu": 2, "rotary": 0},
    "bert": {"norm": 0, "gated": 0, "gelu": 0, "rotary": 0},
}


def frozen(arch: str, dtype: torch.dtype = torch.float64) -> Any:
    return tiny(arch, dtype=dtype).requires_grad_(False)


def gradients(model: Any) -> list[torch.Tensor]:
    """Logits and the gradients of an adapter's tensors."""
    bank = attach(model)
    bank.add("a", LoRA(r=2), seed=1)
    with torch.no_grad():
        for own in bank["a"].tensors.values():
            own["lora_B"].fill_(0.05)
    with bank.use("a"):
        logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    found = [logits.detach(), *(p.grad.clone() for p in bank.parameters("a") if p.grad is not None)]
    bank.detach()
    return found


@pytest.mark.parametrize("arch", OFFERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_numbers(arch: str, dtype: torch.dtype) -> None:
    """Logits and gradients are the model's own to rounding, and every chain that an architecture offers is found."""
    model = frozen(arch, dtype)
    expected = gradients(model)
    assert use_fast_forwards(model) == OFFERS[arch]
    found = gradients(model)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    for some, known in ((found[:1], expected[:1]), (found[1:], expected[1:])):
        a, b = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (some, known))
        assert float((a - b).norm()) <= bound * float(b.norm())


def test_undone_without_a_trace() -> None:
    """After restore_forwards and after the context, with a bank attached and detached around it, every module computes the same bits."""
    model = frozen("llama", torch.float32)
    before = [dict(module.__dict__) for module in model.modules()]
    logits = model(input_ids=IDS).logits
    for use in (fuse_and_unfuse, attach_inside):
        use(model)
        assert [module.__dict__.keys() for module in model.modules()] == [own.keys() for own in before]
        assert torch.equal(model(input_ids=IDS).logits, logits)


def fuse_and_unfuse(model: Any) -> None:
    use_fast_forwards(model)
    restore_forwards(model)


def attach_inside(model: Any) -> None:
    bank = attach(model)
    with fast_modules(model) as found:
        bank.add("a", LoRA(r=2, modules_to_save=("norm",)))
        assert any(found.values())
        bank.detach()


def test_asking_twice_changes_nothing() -> None:
    """Fusing a fused model finds the same modules and puts nothing on top."""
    model = frozen("llama")
    assert use_fast_forwards(model) == use_fast_forwards(model)
    restore_forwards(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_another_model_of_the_class_is_not_touched() -> None:
    """Only instances change: a second model of the same class keeps its class's own forwards."""
    one, other = frozen("llama"), frozen("llama")
    own = type(one.model.norm).forward
    use_fast_forwards(one)
    assert type(other.model.norm).forward is own and "forward" not in other.model.norm.__dict__


class WrongRMSNorm(nn.Module):
    """Looks like an RMSNorm and is none."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.5), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().mean(-1, keepdim=True) * self.weight


class WrongMLP(nn.Module):
    """Has the names of a gated feed-forward, and adds where that multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
        return y


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantized_layers_keep_the_faster_forms(format: str) -> None:
    """The checks compute in the data type of the layers, which is not that of the packed numbers."""
    model = frozen("llama", torch.bfloat16)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and name != "lm_head":
                setattr(parent, name, QuantizedLinear(quantize(layer.weight.detach(), format)))
    assert use_fast_forwards(model) == OFFERS["llama"]


def test_lookalikes_are_left_alone() -> None:
    """A module that computes something else under a familiar name keeps its forward."""
    model = nn.Sequential(WrongRMSNorm(8), WrongMLP())
    assert not any(use_fast_forwards(model).values())
    assert "forward" not in model[0].__dict__ and "forward" not in model[1].__dict__


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    """Where a norm's weight requires gradients, its own forward runs."""
    model = frozen("llama")
    use_fast_forwards(model)
    weight = model.model.norm.weight.requires_grad_()
    model(input_ids=IDS).logits.sum().backward()
    assert weight.grad is not None and weight.grad.any()


def test_autocast_runs_the_models_own_code() -> None:
    """Under autocast nothing is exchanged: the same bits as unfused."""
    model = frozen("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=IDS).logits
        use_fast_forwards(model)
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_copies_and_pickles() -> None:
    """A deep copy and a pickle of a fused model compute the same bits."""
    model = frozen("llama", torch.float32)
    use_fast_forwards(model)
    expected = model(input_ids=IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=IDS).logits, expected)
        assert other.model.norm.forward.module is other.model.norm
