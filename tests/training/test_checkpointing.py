"""Activation checkpointing: the same bits, the model as it was, less memory kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import tiny
from torch import nn

from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.errors import ConfigError
from veneer.models.flat import FlatRunner
from veneer.training.activation_checkpointing import activation_checkpointing, layers_of
from veneer.training.loop.step import Stepper

ARCHS = ("llama", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "bert", "qwen2_moe", "bloom")


def example(seed: int, length: int) -> Example:
    """A random example, every token behind the first one trained."""
    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(tuple(ids), (0.0, *[1.0] * (length - 1)), f"rows:{seed}")


def world(arch: str, **overrides: Any) -> tuple[nn.Module, Bank]:
    """A tiny model with three adapters: LoRA with dropout, DoRA, DoRA with dropout."""
    model = tiny(arch, seed=3, **overrides)
    bank = attach(model)
    bank.add("a", LoRA(r=4, lora_dropout=0.3), seed=1)
    bank.add("b", DoRA(r=3), seed=2)
    bank.add("c", DoRA(r=2, lora_dropout=0.2), seed=3)
    for name in bank:
        for at, parameter in enumerate(bank[name].parameters()):
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(at)))
    return model, bank


def gradients(model: nn.Module, bank: Bank, *, on: bool, passes: int = 2) -> tuple[list[torch.Tensor], list[float]]:
    """Every gradient and loss of a few passes in which three jobs stand side by side, and one alone."""
    runner = FlatRunner(model)
    stepper = Stepper(runner, bank, {"c": {"c": 1.0, "a": 0.5}})
    rows = [(example(i, 5 + 3 * i), "abcab"[i]) for i in range(5)]
    losses = []
    for name in bank:
        bank[name].draws = 0
        for parameter in bank[name].parameters():
            parameter.grad = None
    with activation_checkpointing(model, on):
        for _ in range(passes):
            shares = stepper.forward_backward(make_batch([row for row, _ in rows], [job for _, job in rows]))
            losses += [share.loss for share in shares.values()]
        losses += [share.loss for share in stepper.forward_backward(make_batch([rows[0][0]], "a")).values()]
    return [p.grad.clone() for name in bank for p in bank[name].parameters() if p.grad is not None], losses


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_are_the_same_bits(arch: str) -> None:
    """LoRA with dropout, DoRA and a mix, several jobs in one pass: no bit of a gradient or a loss differs."""
    model, bank = world(arch)
    plain, plain_losses = gradients(model, bank, on=False)
    again, again_losses = gradients(model, bank, on=True)
    assert plain and len(plain) == len(again)
    assert plain_losses == again_losses
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "bloom"])
def test_layers_really_run_again(arch: str) -> None:
    """Each layer runs twice in a pass, and only once where no gradient is wanted."""
    model, bank = world(arch)
    calls = []
    linear = next(m for name, m in layers_of(model)[0].named_modules() if list(m.parameters(recurse=False)))
    linear.register_forward_pre_hook(lambda *_: calls.append(1))
    runner = FlatRunner(model)
    stepper = Stepper(runner, bank)
    batch = make_batch([example(1, 9)], "a")
    calls.clear()
    stepper.forward_backward(batch)
    assert len(calls) == 1
    with activation_checkpointing(model):
        calls.clear()
        stepper.forward_backward(batch)
        assert len(calls) == 2
        calls.clear()
        with torch.no_grad(), bank.use("a", training=False):
            runner.hidden(batch)
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("arch", "dropout"),
    [
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("bloom", {"hidden_dropout": 0.5}),
        ("bert", {"hidden_dropout_prob": 0.5}),
    ],
)
def test_the_bases_own_dropout_stays_off(arch: str, dropout: dict[str, float]) -> None:
    """A base that was trained with dropout computes without it, in the first run of a layer and in the second."""
    model, bank = world(arch, **dropout)
    before = torch.get_rng_state()
    plain, plain_losses = gradients(model, bank, on=False, passes=1)
    again, again_losses = gradients(model, bank, on=True, passes=1)
    assert plain_losses == again_losses and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_less_is_kept_for_backward() -> None:
    """With more layers, what forward keeps grows by one tensor a layer instead of all that is inside."""
    kept = {}
    for on in (False, True):
        model, bank = world("llama", num_hidden_layers=6)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        runner = FlatRunner(model)
        batch = make_batch([example(1, 60)], "b")
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with activation_checkpointing(model, on), bank.use("b", training=True), hooks:
            runner.hidden(batch)
        weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *bank["b"].parameters())}
        kept[on] = sum(size for at, size in sizes.items() if at not in weights)
    assert kept[True] < kept[False] / 4


def test_the_model_is_as_it_was() -> None:
    """After the context, also one that an error left, every attribute of every module is what it was."""
    model, bank = world("opt")
    before = [dict(module.__dict__) for module in model.modules()]
    with activation_checkpointing(model):
        assert any(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError), activation_checkpointing(model):
        raise ZeroDivisionError
    with activation_checkpointing(model, False):
        assert not any(module.training for module in model.modules())
    assert [dict(module.__dict__) for module in model.modules()] == before
    bank.detach()


def test_a_model_without_such_layers_is_told() -> None:
    """What cannot be run again is one sentence, not a silent nothing."""
    with (
        pytest.raises(ConfigError, match="activation_checkpointing: Linear has no layers"),
        activation_checkpointing(nn.Linear(2, 2)),
    ):
        pass
