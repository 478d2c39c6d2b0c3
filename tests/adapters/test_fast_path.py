"""Layers in the fast form: the same as in the plain one, on whole models, under checkpointing, with hooks, in copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny
from torch import Tensor, nn

from veneer.adapters import DoRA, LoRA, attach, bank_of
from veneer.adapters.bank import Bank
from veneer.adapters.runtime import fast_path
from veneer.adapters.runtime.route import Route

ROUTES: dict[str, Any] = {
    "lora": "lora",
    "dora": "dora",
    "rows": ["dora", None, "lora", "dora"],
    "mix": {"lora": 0.5, "dora": 0.7},
    "mixed rows": ["dora", {"lora": 0.5, "dora": 0.7}, "lora", {"lora": -1.0}],
}


def test_layers_that_share_a_call_have_the_same_adapters() -> None:
    """An adapter of values alone acts beside one of queries, keys and values: each row is as it is alone."""
    model: Any = tiny("opt")
    bank = attach(model)
    draw = torch.Generator().manual_seed(0)
    for name, targets in (("a", ("q_proj", "k_proj", "v_proj")), ("b", ("v_proj",))):
        for parameter in bank.add(name, LoRA(r=2, target_modules=targets)).parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    ids = torch.randint(1, 60, (2, 7), generator=draw)
    with torch.no_grad():
        with bank.use(["a", "b"]):
            together = model(input_ids=ids).logits
        for row, name in enumerate("ab"):
            with bank.use(name):
                assert (model(input_ids=ids[row : row + 1]).logits[0] - together[row]).abs().max() <= 2e-6


def model_and_bank(arch: str = "llama", dtype: torch.dtype = torch.float64, p: float = 0.0) -> tuple[Any, Bank]:
    """A tiny model with two adapters whose B is not zero."""
    model: Any = tiny(arch, dtype=dtype).requires_grad_(False)
    bank = attach(model)
    bank.add("lora", LoRA(r=4, lora_alpha=8, lora_dropout=p), seed=1)
    bank.add("dora", DoRA(r=3, lora_alpha=6, lora_dropout=p), seed=2)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in bank.names:
            for own in bank[name].tensors.values():
                own["lora_B"].normal_(0, 0.1, generator=draw)
    return model, bank


@contextmanager
def calls() -> Iterator[list[int]]:
    """How many layers each call of the kernel took."""
    found: list[int] = []
    inner = fast_path.adapted_linear

    def counted(x: Tensor, layers: Any, shares: Any, dense: Any) -> Any:
        found.append(len(layers))
        return inner(x, layers, shares, dense)

    fast_path.adapted_linear = counted
    try:
        yield found
    finally:
        fast_path.adapted_linear = inner


def outcome(model: Any, bank: Bank, route: Any, *, training: bool = False) -> dict[str, Tensor]:
    """Logits and the gradients of all masters."""
    ids = torch.arange(24).reshape(4, 6) % 60 + 1
    for name in bank.names:
        bank[name].draws = 0
        for parameter in bank.parameters(name):
            parameter.grad = None
    with bank.use(route, training=training):
        logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    found = {"logits": logits.detach()}
    for name in bank.names:
        for site, own in bank[name].tensors.items():
            found |= {f"{name} {site} {key}": p.grad.clone() for key, p in own.items() if p.grad is not None}
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-12) -> None:
    """The same tensors, each within ``bound`` in relative L2."""
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        distance = (tensor.double() - expected[key].double()).norm() / expected[key].double().norm().clamp_min(1e-30)
        assert float(distance) < bound, key


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "bert"])
def test_equals_plain_on_models(arch: str, route: str) -> None:
    """Logits and gradients of every master are those of the plain form, for each kind of route."""
    model, bank = model_and_bank(arch)
    found = outcome(model, bank, ROUTES[route])
    bank.fast_path = False
    with calls() as none:
        expected = outcome(model, bank, ROUTES[route])
    assert_close(found, expected)
    assert not none


def test_token_routes() -> None:
    """A route token by token, in one run of tokens each and scattered."""
    model, bank = model_and_bank()
    for index in (torch.arange(24) // 8, torch.arange(24) % 3):
        route = Route.tokens(["lora", None, "dora"], index)
        bank.fast_path = True
        found = outcome(model, bank, route)
        bank.fast_path = False
        assert_close(found, outcome(model, bank, route))


def test_layers_that_share_an_input_share_a_call() -> None:
    """In a Llama block q, k, v are computed together, and gate and up; o and down by themselves."""
    model, bank = model_and_bank()
    with calls() as sizes:
        outcome(model, bank, "lora")
    assert sizes == [3, 1, 2, 1] * model.config.num_hidden_layers


def test_dropout_takes_the_same_masks() -> None:
    """With dropout on, the same numbers as in the plain form: masks are keyed by adapter, pass and site."""
    model, bank = model_and_bank(p=0.3)
    found = outcome(model, bank, ["lora", "dora", "lora", "lora"], training=True)
    without = outcome(model, bank, ["lora", "dora", "lora", "lora"])
    bank.fast_path = False
    assert_close(found, outcome(model, bank, ["lora", "dora", "lora", "lora"], training=True))
    assert not torch.equal(found["logits"], without["logits"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("route", ["dora", "rows"])
def test_activation_checkpointing(reentrant: bool, route: str) -> None:
    """Layers that run again in backward give the same gradients to the bit, dropout and shared calls included."""
    model, bank = model_and_bank(dtype=torch.float32, p=0.2)
    model.train()
    expected = outcome(model, bank, ROUTES[route], training=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with calls() as sizes:
        found = outcome(model, bank, ROUTES[route], training=True)
    assert sorted(sizes) == sorted([3, 1, 2, 1] * 2 * model.config.num_hidden_layers)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_hook_that_changes_a_layers_input_is_respected() -> None:
    """A layer of a group that is handed another tensor computes for itself."""
    model, bank = model_and_bank()
    k_proj = model.model.layers[0].self_attn.k_proj
    handle = k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    found = outcome(model, bank, "lora")
    bank.fast_path = False
    expected = outcome(model, bank, "lora")
    handle.remove()
    assert_close(found, expected)
    assert not torch.equal(expected["logits"], outcome(model, bank, "lora")["logits"])


class Loose(nn.Module):
    """Two layers on one input, which may be changed in place between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, dtype=torch.float64)
        self.two = nn.Linear(8, 8, dtype=torch.float64)
        self.spoil = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x)
        if self.spoil:
            x.mul_(3)
        return y + self.two(x)


def test_an_input_changed_in_place_is_another_input() -> None:
    """What was computed ahead is not taken once the shared input has been written to."""
    model = Loose().requires_grad_(False)
    bank = attach(model, example={"x": torch.randn(3, 5, 8, dtype=torch.float64)})
    bank.add("a", LoRA(r=2, target_modules=["one", "two"]))
    assert bank.sites["one"].group == ("one", "two")
    with torch.no_grad():
        bank["a"].tensors["two"]["lora_B"].normal_()
    model.spoil = True
    x = torch.randn(4, 8, dtype=torch.float64)
    results = []
    for fused in (True, False):
        bank.fast_path = fused
        with bank.use("a"), torch.no_grad():
            results.append(model(x.clone()))
    assert torch.allclose(*results, rtol=1e-12)


def test_weights_that_are_trained_take_the_plain_form() -> None:
    """Where the base's own weight requires gradients, it gets them."""
    model, bank = model_and_bank()
    weight = model.model.layers[1].self_attn.q_proj.weight.requires_grad_()
    outcome(model, bank, "lora")
    assert weight.grad is not None and weight.grad.any()


def test_autocast_takes_the_plain_form() -> None:
    """Under autocast the layer computes in the narrow type, as it would without adapters."""
    model, bank = model_and_bank(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), calls() as sizes, bank.use("lora"):
        logits = model(input_ids=torch.arange(6).reshape(1, 6)).logits
    assert not sizes and logits.dtype == torch.bfloat16


def test_copies_and_pickles() -> None:
    """A deep copy and a pickle of an attached model compute the same, with adapters of their own."""
    model, bank = model_and_bank(dtype=torch.float32)
    expected = outcome(model, bank, ROUTES["rows"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin = bank_of(other)
        assert twin is not None and twin is not bank
        found = outcome(other, twin, ROUTES["rows"])
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_saving_an_attached_model_saves_the_base(tmp_path: Path) -> None:
    """save_pretrained of a model with adapters on it writes the files that the bare model writes, byte for byte, and they load as it."""
    model, bank = model_and_bank(dtype=torch.float32)
    model.save_pretrained(tmp_path / "attached")
    reloaded = type(model).from_pretrained(tmp_path / "attached")
    with torch.no_grad():
        assert torch.equal(
            reloaded(input_ids=torch.arange(6)[None]).logits, model(input_ids=torch.arange(6)[None]).logits
        )
    bank.detach()
    model.save_pretrained(tmp_path / "bare")
    for file in (tmp_path / "bare").iterdir():
        assert (tmp_path / "attached" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "attached").iterdir())) == len(list((tmp_path / "bare").iterdir())) >= 2


def crowd(dtype: torch.dtype, count: int = 9) -> tuple[Any, Bank]:
    """A tiny model with many adapters: ranks 1 to 16, LoRA, rsLoRA and DoRA, some on a few layers only."""
    model: Any = tiny("llama", dtype=dtype).requires_grad_(False)
    bank = attach(model)
    draw = torch.Generator().manual_seed(3)
    for i in range(count):
        options: dict[str, Any] = {"r": (1, 2, 7, 4, 16)[i % 5], "lora_alpha": 8.0, "use_rslora": i % 4 == 3}
        if i % 3 == 2:
            options["target_modules"] = ["q_proj", "down_proj"]
        bank.add(f"a{i}", (DoRA if i % 3 == 1 else LoRA)(**options), seed=i)
        with torch.no_grad():
            for own in bank[f"a{i}"].tensors.values():
                own["lora_B"].normal_(0, 0.1, generator=draw)
    return model, bank


def popular(kind: str, rows: int = 12) -> list[str | None]:
    """Which adapter each row takes."""
    distinct = [f"a{i % 9}" for i in range(rows)]
    return {
        "distinct": distinct,
        "identical": ["a4"] * rows,
        "uniform": [f"a{i % 3}" for i in range(rows)],
        "skewed": ["a0"] * (rows - 4) + ["a1", "a2", "a7", None],
        "with base rows": [name if i % 3 else None for i, name in enumerate(distinct)],
    }[kind]


@pytest.mark.parametrize("kind", ["distinct", "identical", "uniform", "skewed", "with base rows"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_mixed_batches_equal_separate_ones(kind: str, tokens: int) -> None:
    """Rows of a mixed batch give what each gives under its own adapter alone, in outputs and in every adapter's gradients."""
    model, bank = crowd(torch.float64)
    route = popular(kind)
    ids = torch.arange(len(route) * tokens).reshape(len(route), tokens) % 60 + 1

    def gradients() -> dict[str, Tensor]:
        return {f"{n} {i}": p.grad for n in bank.names for i, p in enumerate(bank.parameters(n)) if p.grad is not None}

    with bank.use(route):
        mixed = model(input_ids=ids).logits
    mixed.square().sum().backward()
    found = gradients()
    for name in bank.names:
        for parameter in bank.parameters(name):
            parameter.grad = None
    for i, name in enumerate(route):
        with bank.use(name):
            alone = model(input_ids=ids[i : i + 1]).logits
        if name is not None:
            alone.square().sum().backward()
        assert float((mixed[i] - alone[0]).detach().norm()) <= 1e-12 * float(alone.detach().norm())
    expected = gradients()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for key, gradient in expected.items():
        # A query's gradient is zero where there is one token only, and what is left of it is rounding.
        distance = gradient.norm() if key not in found else (found[key] - gradient).norm()
        assert float(distance) <= 1e-11 * max(float(gradient.norm()), 1e-4 * largest), key


def test_base_rows_keep_their_bits_in_a_mixed_batch() -> None:
    """Rows of the base are, to the bit, what they are when all rows are the base's."""
    model, bank = crowd(torch.float32)
    route = popular("with base rows")
    ids = torch.arange(48).reshape(12, 4) % 60 + 1
    with torch.no_grad():
        with bank.use(route):
            mixed = model(input_ids=ids).logits
        with bank.use(None):
            base = model(input_ids=ids).logits
    rows = [i for i, name in enumerate(route) if name is None]
    assert torch.equal(mixed[rows], base[rows]) and not torch.equal(mixed, base)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_kept_between_calls_follows_every_change(mode: Any) -> None:
    """Factors and banks of frozen adapters, kept between calls, are made anew once a tensor of an adapter changes; those of adapters that
    may be trained are not kept at all."""
    model, bank = crowd(torch.float64)
    for name in bank.names:
        bank[name].requires_grad_(name == "a4")
    ids = torch.arange(12).reshape(12, 1) + 1
    route: Any = popular("distinct")

    def outputs(fused: bool) -> Tensor:
        bank.fast_path = fused
        with mode(), bank.use(route):
            return model(input_ids=ids).logits.clone()

    def agree() -> None:
        for _ in range(2):
            assert float((outputs(True) - outputs(False)).norm()) <= 1e-12 * float(outputs(False).norm())

    agree()
    before = outputs(True)
    tensors, loose = (bank[name].tensors["model.layers.0.mlp.down_proj"] for name in ("a1", "a4"))
    changes: list[Any] = [
        lambda: tensors["lora_A"].mul_(1.5),
        lambda: setattr(tensors["lora_B"], "data", tensors["lora_B"].data * 2),
        lambda: tensors["lora_magnitude_vector"].detach().add_(0.3),
        lambda: loose["lora_A"].data.mul_(1.5),
        lambda: (tensors["lora_A"].data.mul_(0.5), bank.runtime.frozen.forget("a1")),
    ]
    for change in changes:
        change()
        agree()
        after = outputs(True)
        assert not torch.equal(after, before)
        before = after
    route = popular("uniform")
    agree()
