"""forward_backward: each job gets the gradient that it would have alone, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.training.made import World, apart, examples

from veneer.adapters import Bank, DoRA, LoRA
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.models.layout import Layout

METHODS = {
    "plain": LoRA(r=3),
    "rs": LoRA(r=5, use_rslora=True, lora_dropout=0.3),
    "dora": DoRA(r=2),
    "dropped": DoRA(r=4, lora_dropout=0.2),
}


def world(arch: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> World:
    made = World(arch, dtype=dtype, **overrides)
    for seed, (name, method) in enumerate(METHODS.items()):
        made.job(name, method, seed=seed)
    return made


def gradients(bank: Bank, name: str) -> list[torch.Tensor]:
    """A job's gradients, taken away from it."""
    found = []
    for parameter in bank[name].parameters():
        found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
        parameter.grad = None
    return found


def run(made: World, rows: list[tuple[str, Example]]) -> dict[str, list[torch.Tensor]]:
    made.stepper.forward_backward(make_batch([row for _, row in rows], [job for job, _ in rows]))
    return {name: gradients(made.bank, name) for name in METHODS}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "bloom", "mamba"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_mixed_batch_gives_each_job_its_own_gradient(arch: str, dtype: torch.dtype, close: float) -> None:
    """LoRA, rsLoRA and DoRA, with and without dropout, rows of all mixed, flat and padded bases: as each job alone."""
    made = world(arch, dtype)
    rows = [(name, row) for name, row in zip([*METHODS] * 3, examples(12), strict=True)]
    mixed = run(made, rows)
    for name in METHODS:
        for other in METHODS:
            made.bank[other].draws = 0
        alone = run(made, [row for row in rows if row[0] == name])
        assert apart(mixed[name], alone[name]) < close
        assert max(float(g.norm()) for g in alone[name]) > 0


def test_shares_are_each_jobs_own() -> None:
    """Loss, weight and tokens are counted job by job, and the sum of weights is that of the examples."""
    made = world()
    rows = [(name, row) for name, row in zip([*METHODS] * 2, examples(8), strict=True)]
    together = made.stepper.forward_backward(make_batch([row for _, row in rows], [job for job, _ in rows]))
    for name in METHODS:
        made.bank[name].draws = 0
        own = [row for job, row in rows if job == name]
        alone = made.stepper.forward_backward(make_batch(own, name))[name]
        assert together[name].weight == alone.weight == sum(sum(row.weights) for row in own)
        assert together[name].tokens == sum(map(len, own))
        assert together[name].loss == pytest.approx(alone.loss, rel=1e-6)


@pytest.mark.parametrize("cuts", [(6,), (1, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1)])
def test_accumulation_changes_no_mathematics(cuts: tuple[int, ...]) -> None:
    """The gradient of six examples is the same in one pass and in any number of passes."""
    made = world()
    rows = examples(6, seed=3)
    whole = run(made, [("plain", row) for row in rows])["plain"]
    at = 0
    for size in cuts:
        made.stepper.forward_backward(make_batch(rows[at : at + size], "plain"))
        at += size
    assert apart(gradients(made.bank, "plain"), whole) < 1e-6


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_the_layout_of_a_batch_is_computed_once(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step computes one layout, on bases that run flat and on those that run as padded rows."""
    made = world(arch)
    counted: list[str] = []
    for kind in ("flat", "padded"):
        make = getattr(Layout, kind)
        monkeypatch.setattr(
            Layout, kind, staticmethod(lambda batch, make=make, kind=kind: counted.append(kind) or make(batch))
        )
    run(made, list(zip(METHODS, examples(4), strict=True)))
    assert len(counted) == 1


def test_weights_of_tokens_are_in_the_gradient() -> None:
    """An example with weight 2 counts as the same example twice."""
    made = world()
    row = examples(1)[0]
    twice = Example(row.ids, tuple(2 * w for w in row.weights), row.source)
    assert apart(run(made, [("dora", twice)])["dora"], run(made, [("dora", row), ("dora", row)])["dora"]) < 1e-6


def test_an_adapted_head_takes_part() -> None:
    """A job that adapts the head trains through the logits, beside one that does not; each as alone."""
    made = World()
    made.job("head", LoRA(r=2, target_modules=["lm_head", "q_proj"]))
    made.job("body", LoRA(r=2), seed=1)
    rows = list(zip(["head", "body"] * 3, examples(6), strict=True))
    made.stepper.forward_backward(make_batch([row for _, row in rows], [job for job, _ in rows]))
    mixed = {name: gradients(made.bank, name) for name in ("head", "body")}
    for name in ("head", "body"):
        made.stepper.forward_backward(make_batch([row for job, row in rows if job == name], name))
        assert apart(mixed[name], gradients(made.bank, name)) < 1e-5


def test_what_raises_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails half way through backward has added no gradient and drawn no dropout."""
    made = world()
    rows = [(name, row) for name, row in zip([*METHODS], examples(4), strict=True)]
    batch = make_batch([row for _, row in rows], [job for job, _ in rows])
    made.stepper.forward_backward(batch)
    before = {name: [p.grad.clone() for p in made.bank[name].parameters() if p.grad is not None] for name in METHODS}
    layer = made.model.model.layers[0].self_attn.o_proj
    handle = layer.register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.stepper.forward_backward(batch)
    handle.remove()
    for name in METHODS:
        assert made.bank[name].draws == (1 if METHODS[name].lora_dropout else 0)
        now = [p.grad for p in made.bank[name].parameters() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(now, before[name], strict=True))


def test_the_base_is_neither_moved_nor_given_gradients() -> None:
    """After passes of all methods the base's tensors are bitwise what they were, without gradients."""
    made = world()
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    run(made, [(name, row) for name, row in zip([*METHODS], examples(4), strict=True)])
    assert all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_gradients_lie_in_memory_as_their_tensors_do() -> None:
    """torch's fused optimizers read memory and not strides: a transposed gradient would train something else."""
    made = world()
    batch = make_batch(examples(4), ["plain", "rs", "dora", "dropped"])
    for _ in range(2):
        made.stepper.forward_backward(batch)
        for name in METHODS:
            assert all(p.grad.stride() == p.stride() for p in made.bank[name].parameters() if p.grad is not None)


def test_examples_whose_loss_is_not_finite_are_named() -> None:
    """The share of a job says which of its examples are at fault, and a neighbour's share does not."""
    made = world()
    rows = examples(4)
    with torch.no_grad():
        made.bank["rs"].tensors["model.layers.0.mlp.down_proj"]["lora_B"].fill_(float("nan"))
    shares = made.stepper.forward_backward(make_batch([rows[0], rows[1], rows[2]], ["plain", "rs", "plain"]))
    assert (shares["rs"].faults, shares["plain"].faults) == (("rows:1",), ())
