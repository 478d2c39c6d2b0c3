"""What is remembered of a route from call to call never outlives what it was made from."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.adapters.made import bits, nudge
from tests.tiny import tiny
from torch import Tensor, nn

from veneer.adapters import Adapter, Bank, DoRA, LoRA, Route, attach, bank_of
from veneer.adapters.runtime import grouping
from veneer.adapters.runtime.plan import Assignment, PlanCache

NAMES = [f"a{i}" for i in range(8)]
ROWS: list[Any] = ["a0", "a3", None, "a5", "a1", "a0", "a7", "a2"]


def world(dtype: torch.dtype = torch.float32, p: float = 0.0) -> tuple[Any, Bank]:
    """A tiny model with eight frozen adapters, LoRA and DoRA of several ranks."""
    model: Any = tiny("llama", dtype=dtype)
    bank = attach(model)
    for i, name in enumerate(NAMES):
        nudge(bank.add(name, (DoRA if i % 2 else LoRA)(r=1 + 2 * i, lora_dropout=p), seed=i), by=0.05, seed=i)
        bank[name].requires_grad_(False)
    return model, bank


def ids(rows: int = 8, tokens: int = 1) -> Tensor:
    return torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(rows + tokens))


def run(model: Any, bank: Bank, route: Any, batch: Tensor, **options: Any) -> Tensor:
    with torch.no_grad(), bank.use(route, **options):
        out: Tensor = model(input_ids=batch).logits
    return out


def plain(model: Any, bank: Bank, route: Any, batch: Tensor) -> Tensor:
    """By the plain form, which remembers nothing."""
    bank.fast_path = False
    try:
        return run(model, bank, route, batch)
    finally:
        bank.fast_path = True


def remembered(bank: Bank) -> int:
    """How many layers of how many routes are remembered."""
    return sum(len(plan.calls) for plan in bank.runtime.tracker.plans._plans.values())


def test_the_second_call_is_the_first_to_the_bit() -> None:
    """A step that looks like the one before takes what was worked out, and gives the same bits; another batch gives its own."""
    model, bank = world()
    first = run(model, bank, ROWS, ids())
    layers = remembered(bank)
    assert layers > 0
    for _ in range(3):
        assert torch.equal(bits(run(model, bank, list(ROWS), ids())), bits(first))
    assert remembered(bank) == layers
    other = (ids() * 7) % 300 + 3
    torch.testing.assert_close(run(model, bank, ROWS, other), plain(model, bank, ROWS, other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
def test_every_route_and_size_has_its_own(tokens: int) -> None:
    """Routes, orders and sizes by turns, more than are kept: each call is that of the plain form."""
    model, bank = world(torch.float64)
    routes = [ROWS, ROWS[::-1], "a1", None, ["a2"] * 8, [{"a0": 0.5, "a1": 0.5}, *ROWS[1:]], [None] * 7 + ["a4"]]
    for _ in range(2):
        for route in routes:
            for size in (tokens, tokens + 1):
                found = run(model, bank, route, ids(tokens=size))
                torch.testing.assert_close(found, plain(model, bank, route, ids(tokens=size)), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "what", ["tensor", "replaced", "trained", "weight", "dropout", "again", "another", "hook", "mode"]
)
def test_a_change_is_seen(what: str) -> None:
    """Whatever changes between two calls (an adapter's numbers, a weight of the base, who is trained, what drops out, who is in the bank,
    what stands at a layer) the second call goes by it."""
    model, bank = world(torch.float64, p=0.3 if what == "dropout" else 0.0)
    before = run(model, bank, ROWS, ids())
    run(model, bank, ROWS, ids())
    layer = model.model.layers[0].self_attn.v_proj
    if what == "tensor":
        with torch.no_grad():
            bank["a5"].tensors["model.layers.0.self_attn.v_proj"]["lora_B"].mul_(3)
    elif what == "replaced":
        own: Any = bank["a5"].tensors["model.layers.0.mlp.up_proj"]
        own["lora_B"] = nn.Parameter(own["lora_B"].detach() * 3, requires_grad=False)
    elif what == "trained":
        bank["a5"].requires_grad_(True)
        bank["a5"].tensors["model.layers.0.mlp.up_proj"]["lora_B"].data.mul_(3)
    elif what == "weight":
        with torch.no_grad():
            layer.weight.mul_(1.5)
    elif what == "dropout":
        assert not torch.equal(run(model, bank, ROWS, ids(), training=True), before)
        assert torch.equal(run(model, bank, ROWS, ids(), training=False), before)
        return
    elif what == "again":
        bank.remove("a5")
        nudge(bank.add("a5", LoRA(r=2), seed=99), seed=99)
        bank["a5"].requires_grad_(False)
    elif what == "another":
        nudge(bank.add("b", LoRA(r=2, target_modules="lm_head")))
        bank["b"].requires_grad_(False)
        assert torch.equal(run(model, bank, ROWS, ids()), before)
        ROUTE: list[Any] = ["b", *ROWS[1:]]
        torch.testing.assert_close(
            run(model, bank, ROUTE, ids()), plain(model, bank, ROUTE, ids()), rtol=1e-10, atol=1e-11
        )
        return
    elif what == "hook":
        layer.register_forward_hook(lambda module, args, output: output * 2)
    else:
        model.to(torch.float32)
        before = before.float()
    after = run(model, bank, ROWS, ids())
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if after.dtype == torch.float64 else {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(after, plain(model, bank, ROWS, ids()), **tolerance)
    if what != "mode":
        assert not torch.allclose(after, before, rtol=1e-6, atol=1e-8)


def test_training_after_serving_gets_gradients() -> None:
    """What was remembered without gradients is not taken with them."""
    model, bank = world()
    run(model, bank, ROWS, ids())
    for name in bank:
        bank[name].requires_grad_(True)
    with bank.use(ROWS):
        model(input_ids=ids()).logits.square().mean().backward()
    used = {name for name in ROWS if name}
    assert all((p.grad is not None) == (name in used) for name in bank for p in bank.parameters(name))


def test_a_copy_remembers_for_itself() -> None:
    """A deep copy, or a pickled one, of a model that has served gives its own numbers when its own adapters change."""
    model, bank = world()
    expected = run(model, bank, ROWS, ids())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = bank_of(twin)
        assert torch.equal(run(twin, other, ROWS, ids()), expected)
        with torch.no_grad():
            other["a5"].tensors["model.layers.0.self_attn.v_proj"]["lora_B"].mul_(3)
        assert not torch.equal(run(twin, other, ROWS, ids()), expected)
        assert torch.equal(run(model, bank, ROWS, ids()), expected)


def test_only_the_last_few_are_kept() -> None:
    """A thousand routes leave a handful behind; detaching leaves none."""
    mapping = PlanCache({f"a{i}": Adapter(f"a{i}", LoRA(), {}, {}) for i in range(1000)})
    kept = [mapping.plan(Route.parse([f"a{i}", None]), ((2, 1),), None) for i in range(1000)]
    assert len(mapping._plans) == 4
    assert mapping.plan(Route.parse(["a999", None]), ((2, 1),), None) is kept[-1]
    assert mapping.plan(Route.parse(["a999", None]), ((2, 5),), None) is not kept[-1]
    model, bank = world()
    run(model, bank, ROWS, ids())
    bank.detach()
    assert remembered(bank) == 0


@pytest.mark.parametrize("tokens", [1, 4])
def test_groups_hold_what_padding_allows(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However groups are cut, from one for all to one for each rank, the numbers are the same."""
    model, bank = world(torch.float64)
    found = []
    for waste in (0, 500, 10**9):
        monkeypatch.setattr(grouping, "_PADDING", waste)
        bank.runtime.tracker.plans.clear()
        found.append(run(model, bank, ROWS, ids(tokens=tokens)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-11)
    ranked = [
        (rank, Assignment(f"a{i}", torch.tensor([i]), 1.0, None, "always"))
        for i, rank in enumerate((64, 4, 8, 4, 64, 16))
    ]
    monkeypatch.setattr(grouping, "_PADDING", 100_000)
    assert [len(group) for group in grouping.by_rank(ranked, 1152)] == [4, 2]
    assert [len(group) for group in grouping.by_rank(ranked, 16)] == [6]
    assert sorted(part[0] for group in grouping.by_rank(ranked, 10**6) for part in group) == [f"a{i}" for i in range(6)]


def test_nan_stays_with_its_adapter_in_a_group_with_others() -> None:
    """LoRA and DoRA of several ranks in one group: what is broken in one, with and without a magnitude, reaches its own rows only."""
    for broken in ("a0", "a3"):
        model, bank = world()
        healthy = run(model, bank, ROWS, ids())
        with torch.no_grad():
            for own in bank[broken].tensors.values():
                for value in own.values():
                    value.view(-1)[0] = float("nan")
        found = run(model, bank, ROWS, ids())
        for i, name in enumerate(ROWS):
            assert torch.equal(bits(found[i]), bits(healthy[i])) == (name != broken)
            assert found[i].isfinite().all() == (name != broken)


def test_a_removed_adapter_leaves_nothing_kept() -> None:
    """What is kept of frozen adapters goes with them, so loading and unloading under new names does not grow."""
    bank = attach(tiny("llama"))
    for number in range(3):
        names = [f"a{number}", f"b{number}"]
        for name in names:
            bank.add(name, LoRA(r=2)).requires_grad_(False)
        with torch.no_grad(), bank.use(names):
            bank.model(input_ids=torch.ones(2, 3, dtype=torch.long))
        for name in names:
            bank.remove(name)
    assert not any(bank.runtime.frozen._kept.values())
