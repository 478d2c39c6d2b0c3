"""Mixed batches against each adapter by itself: over how popular adapters are, five ranks, three methods, and against PEFT row by row."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.adapters.made import bits, merged_model, nudge
from tests.adapters.peers import peft_tensor, peft_twin
from tests.tiny import tiny
from torch import Tensor

from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.kernels import cpp_library as native

RANKS = (1, 2, 7, 16, 64)
METHODS: dict[str, LoRA | DoRA] = {
    f"{kind}{r}": method
    for r in RANKS
    for kind, method in (
        ("lora", LoRA(r=r, lora_alpha=2 * r)),
        ("rs", LoRA(r=r, lora_alpha=3, use_rslora=True)),
        ("dora", DoRA(r=r, lora_alpha=2 * r)),
    )
}
NAMES = [*METHODS]
ROWS = 16
Rows = Sequence[Any]


def popularity(kind: str) -> list[str | None]:
    """Whose row each of sixteen is."""
    draw = random.Random(kind)
    names = draw.sample(NAMES, len(NAMES))
    if kind == "distinct":
        return [*names, None]
    if kind == "identical":
        return ["dora7"] * ROWS
    if kind == "uniform":
        return draw.choices(names, k=ROWS)
    if kind == "zipf":
        return draw.choices(names, [1 / (i + 1) for i in range(len(names))], k=ROWS)
    if kind == "skewed":
        return draw.sample([names[0]] * (ROWS - 2) + names[1:3], ROWS)
    return [None if draw.random() < 0.4 else draw.choice(names) for _ in range(ROWS)]


@pytest.fixture(params=["python", "C++"])
def kernels(request: pytest.FixtureRequest) -> None:
    """The test runs twice: with the plain forms, and with kernels in C++."""
    if request.param == "C++":
        request.getfixturevalue("native_kernels")


KINDS = ("distinct", "identical", "uniform", "zipf", "skewed", "some base")


def world(dtype: torch.dtype) -> tuple[Any, Bank]:
    """A tiny model with fifteen adapters that were moved."""
    model: Any = tiny("llama", dtype=dtype)
    bank = attach(model)
    for i, (name, method) in enumerate(METHODS.items()):
        nudge(bank.add(name, method, seed=i), by=0.1 / method.r**0.5, seed=i)
    return model, bank


def ids(tokens: int, rows: int = ROWS) -> Tensor:
    """Token ids [rows, tokens]."""
    return torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def passed(model: Any, bank: Bank, route: Any, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients that the adapters of the route get from a loss that is a sum over rows."""
    for name in bank:
        for parameter in bank.parameters(name):
            parameter.grad = None
    with bank.use(route):
        logits = model(input_ids=batch).logits
    if logits.requires_grad:
        logits.square().mean((1, 2)).sum().backward()
    grads = {
        f"{name} {site} {key}": value.grad.clone()
        for name in bank
        for site, key, value in bank[name].named_tensors()
        if value.grad is not None
    }
    return logits.detach(), grads


def separate(model: Any, bank: Bank, rows: Rows, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, with the rows of each adapter in a batch of their own."""
    whole: Tensor | None = None
    grads: dict[str, Tensor] = {}
    for name in dict.fromkeys(rows):
        at = torch.tensor([i for i, row in enumerate(rows) if row == name])
        logits, own = passed(model, bank, name, batch[at])
        whole = logits.new_empty(len(rows), *logits.shape[1:]) if whole is None else whole
        whole[at] = logits
        grads |= own
    assert whole is not None
    return whole, grads


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative distance (L2) of two sets of tensors with the same names."""
    assert found.keys() == expected.keys()
    pairs = [(found[key].double(), expected[key].double()) for key in expected]
    return max((float((one - other).norm() / other.norm()) for one, other in pairs), default=0.0)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float, tokens: int) -> bool:
    """Whether every tensor is within ``bound``; where a row is one token, every adapter's tensors together.

    A lone token has only itself to look at: gradients of q and k are zero but for rounding, and others nearly cancel, so that what is
    rounding shows in single tensors. In fp64 all but q and k are held one by one all the same.
    """
    if tokens > 1:
        return furthest(found, expected) <= bound
    if bound < 1e-8:
        kept = [key for key in expected if "q_proj" not in key and "k_proj" not in key]
        return furthest({key: found[key] for key in kept}, {key: expected[key] for key in kept}) <= bound
    whole: list[dict[str, Tensor]] = []
    for grads in (found, expected):
        names = dict.fromkeys(key.split(" ")[0] for key in expected)
        whole.append(
            {name: torch.cat([g.flatten() for k, g in grads.items() if k.split(" ")[0] == name]) for name in names}
        )
    return furthest(*whole) <= bound


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_is_separate_in_fp32(kind: str, tokens: int, fused: bool) -> None:
    """Outputs within 2e-6, every tensor's gradient within 1e-5; base rows are those of a batch of base rows, to the bit."""
    model, bank = world(torch.float32)
    bank.fast_path = fused
    rows, batch = popularity(kind), ids(tokens)
    logits, grads = passed(model, bank, rows, batch)
    expected, alone = separate(model, bank, rows, batch)
    assert 0.3 < float(expected.abs().max()) < 30
    assert float((logits - expected).abs().max()) <= 2e-6 * max(1.0, float(expected.abs().max()))
    assert close(grads, alone, 1e-5, tokens)
    base, _ = passed(model, bank, None, batch)
    for i, row in enumerate(rows):
        assert torch.equal(bits(logits[i]), bits(base[i])) == (row is None)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_is_separate_in_fp64(kind: str, tokens: int) -> None:
    """The same within 1e-12: what differs in fp32 is rounding and nothing else."""
    model, bank = world(torch.float64)
    rows, batch = popularity(kind), ids(tokens)
    logits, grads = passed(model, bank, rows, batch)
    expected, alone = separate(model, bank, rows, batch)
    assert float((logits - expected).norm() / expected.norm()) <= 1e-12
    assert close(grads, alone, 1e-12, tokens)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_rounds_as_separate_in_bf16(kind: str) -> None:
    """In bf16 a mixed batch is as far from the exact numbers as separate ones are, outputs and gradients alike."""
    exact_model, exact_bank = world(torch.float64)
    model, bank = world(torch.bfloat16)
    with torch.no_grad():
        for mine, theirs in zip(exact_model.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
        for name in bank:
            for mine, theirs in zip(exact_bank.parameters(name), bank.parameters(name), strict=True):
                mine.copy_(theirs)
    rows, batch = popularity(kind), ids(7)
    exact, slopes = passed(exact_model, exact_bank, rows, batch)
    logits, grads = passed(model, bank, rows, batch)
    native.use(None)  # in C++ an adapter alone is nearer to the exact numbers than any other way
    apart, alone = separate(model, bank, rows, batch)

    def error(found: Tensor, wanted: Tensor) -> float:
        return float((found.double() - wanted).norm() / wanted.norm())

    assert error(logits, exact) <= 1.2 * error(apart, exact) <= 0.05
    if slopes:
        # All tensors together: which single one is the worst, by a factor of two, is chance.
        every = [torch.cat([found[key].double().flatten() for key in slopes]) for found in (grads, alone, slopes)]
        assert error(every[0], every[2]) <= 1.2 * error(every[1], every[2]) <= 0.05
    assert max((error(grads[key], slope) for key, slope in slopes.items()), default=0.0) <= 0.2


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tokens", [1, 7])
def test_each_row_is_that_of_its_own_peft_model(tokens: int) -> None:
    """Fifteen adapters of three methods (DoRA too) and five ranks and a base row in one batch, each as PEFT alone computes it."""
    plain: Any = tiny("llama")
    model, bank = world(torch.float32)
    rows, batch = popularity("distinct"), ids(tokens)
    logits, grads = passed(model, bank, rows, batch)
    with torch.no_grad():
        assert torch.equal(bits(logits[-1]), bits(plain(input_ids=batch).logits[-1]))
    for i, name in enumerate(rows[:-1]):
        assert name is not None
        theirs = peft_twin(copy.deepcopy(plain), bank[name])
        out = theirs(input_ids=batch[i : i + 1]).logits[0]
        out.square().mean().backward()
        expected = out.detach()
        assert float((logits[i] - expected).abs().max()) <= 2e-6 * max(1.0, float(expected.abs().max())), name
        slopes = {}
        for site, key, value in bank[name].named_tensors():
            slope = peft_tensor(theirs.base_model.model, site, key).grad
            assert slope is not None
            slopes[f"{name} {site} {key}"] = slope.reshape(value.shape)
        assert close({key: grads[key] for key in slopes}, slopes, 1e-5, tokens), name


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("seed", range(4))
def test_weighted_mixes_are_dense_weights(seed: int, fused: bool) -> None:
    """Each row with a mix of its own, of up to four adapters of any method, rank and sign: as through the weights merged for that row."""
    draw = random.Random(seed)
    model, bank = world(torch.float64)
    bank.fast_path = fused
    rows = [
        {name: draw.uniform(-1, 1.5) for name in draw.sample(NAMES, draw.randint(0, 4))} or None for _ in range(ROWS)
    ]
    batch = ids(3)
    with torch.no_grad(), bank.use(rows):
        logits = model(input_ids=batch).logits
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = merged_model(bank, row)(input_ids=batch[i : i + 1]).logits[0]
        assert float((logits[i] - expected).norm() / expected.norm()) <= 1e-11


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_mixes_beside_single_adapters_train_alike(dtype: torch.dtype) -> None:
    """Rows with weighted mixes beside rows with one adapter and the base: gradients are the sums of those of each row alone."""
    model, bank = world(dtype)
    rows: list[Any] = ["dora16", {"lora7": 0.6, "dora2": -0.5}, None, {"dora2": 1.0, "rs64": 0.3, "lora1": 2.0}, "rs64"]
    batch = ids(4, len(rows))
    logits, grads = passed(model, bank, rows, batch)
    sums: dict[str, Tensor] = {}
    for i, row in enumerate(rows):
        alone, own = passed(model, bank, row, batch[i : i + 1])
        assert float((logits[i] - alone[0]).abs().max()) <= (2e-6 if dtype == torch.float32 else 1e-12)
        for key, grad in own.items():
            sums[key] = sums[key] + grad if key in sums else grad
    assert furthest(grads, sums) <= (1e-5 if dtype == torch.float32 else 1e-12)
