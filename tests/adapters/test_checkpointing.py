"""Activation checkpointing of both kinds: what runs again in backward runs under its own route, or says that it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.adapters.made import nudge
from tests.adapters.peers import inputs_of
from tests.tiny import tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.adapters import Bank, DoRA, LoRA, Route, attach
from veneer.errors import RouteError

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["saved-hooks", "reentrant"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])


@contextmanager
def noted_as_usual() -> Iterator[None]:
    """torch warns where a reentrant checkpoint gets no input with a gradient; that is the point of some tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield


def banked(arch: str = "llama", dropout: float = 0.0, exact: bool = False, **overrides: Any) -> tuple[Any, Bank]:
    model: Any = tiny(arch, dtype=torch.float64, **overrides)
    bank = attach(model)
    nudge(bank.add("a", LoRA(r=3, lora_alpha=6, lora_dropout=dropout), seed=1), by=0.1, seed=1)
    nudge(
        bank.add("b", DoRA(r=2, lora_alpha=4, lora_dropout=dropout, exact_norm_gradient=exact), seed=2), by=0.1, seed=2
    )
    return model, bank


def turn_on(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    if not reentrant:
        # transformers makes the embeddings' output require a gradient by itself; without that the hooks have more to do.
        model.disable_input_require_grads()


def slopes(bank: Bank) -> dict[str, list[Tensor | None]]:
    """Gradients by adapter; they are taken off."""
    found = {}
    for name in bank:
        found[name] = [p.grad for p in bank.parameters(name)]
        for parameter in bank.parameters(name):
            parameter.grad = None
    return found


def same(one: dict[str, list[Tensor | None]], other: dict[str, list[Tensor | None]]) -> bool:
    pairs = [(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)]
    assert any(a is not None and a.abs().max() > 0 for a, _ in pairs)
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.allclose(a, b, rtol=1e-8, atol=1e-11))
        for a, b in pairs
    )


ROUTES: list[Any] = ["a", "b", ["b", None], [{"a": 0.5, "b": 2.0}, "a"]]


@FUSED
@KINDS
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "bert", "t5"])
def test_gradients_are_those_without_checkpointing(arch: str, reentrant: bool, inside: bool, fused: bool) -> None:
    """Whether backward runs inside the route's context or after it, every gradient is the one of the plain run."""
    model, bank = banked(arch)
    bank.fast_path = fused
    batch = inputs_of(model)

    def run(route: Any) -> dict[str, list[Tensor | None]]:
        with bank.use(route):
            loss = model(**batch).logits.square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return slopes(bank)

    model.train()
    expected = [run(route) for route in ROUTES]
    turn_on(model, reentrant)
    for route, wanted in zip(ROUTES, expected, strict=True):
        assert same(wanted, run(route))


@KINDS
def test_backward_inside_another_route(reentrant: bool) -> None:
    """A route that is open during backward, or a base forward in between, does not reach what runs again."""
    model, bank = banked()
    batch = inputs_of(model)
    model.train()
    with bank.use(["a", "b"]):
        model(**batch).logits.square().mean().backward()
    expected = slopes(bank)
    turn_on(model, reentrant)
    with bank.use(["a", "b"]):
        loss = model(**batch).logits.square().mean()
    with bank.use("b"):
        with noted_as_usual(), torch.no_grad():
            model(**batch)
        loss.backward()
    assert same(expected, slopes(bank))


@KINDS
def test_two_routes_and_one_backward(reentrant: bool) -> None:
    """Two forwards of one model under different routes, summed into one loss."""
    model, bank = banked()
    batch = inputs_of(model)

    def run() -> dict[str, list[Tensor | None]]:
        total = torch.zeros((), dtype=torch.float64)
        for route in ("a", ["b", "a"], None):
            with bank.use(route):
                total = total + model(**batch).logits.square().mean()
        total.backward()
        return slopes(bank)

    model.train()
    expected = run()
    turn_on(model, reentrant)
    assert same(expected, run())


@FUSED
@KINDS
def test_the_same_mask_is_drawn_again(reentrant: bool, fused: bool) -> None:
    """With dropout what runs again draws the mask of its forward; the next step draws another one, under checkpointing as without."""
    found = []
    for how in (None, reentrant):
        model, bank = banked(dropout=0.4)
        bank.fast_path = fused
        model.train()
        if how is not None:
            turn_on(model, how)
        steps = []
        for _ in range(2):
            with bank.use(["a", "b"]):
                loss = model(**inputs_of(model)).logits.square().mean()
            loss.backward()
            steps.append((float(loss.detach()), slopes(bank)))
        found.append(steps)
        assert bank["a"].draws == bank["b"].draws == 2
    assert found[0][0][0] != found[0][1][0]
    for (loss, wanted), (other, got) in zip(*found, strict=True):
        assert loss == pytest.approx(other, abs=1e-12) and same(wanted, got)


@KINDS
def test_the_gradient_through_the_norm_survives(reentrant: bool) -> None:
    """DoRA with the exact norm gradient: a norm that was taken without gradients in the first half is taken again with them."""
    model, bank = banked(exact=True)
    batch = inputs_of(model)
    found = []
    for on in (False, True):
        model.train()
        if on:
            turn_on(model, reentrant)
        with bank.use("b"):
            model(**batch).logits.square().mean().backward()
        found.append(slopes(bank))
    assert same(*found)


def test_frozen_embeddings_under_the_reentrant_kind_are_an_error() -> None:
    """Nothing would train: torch only warns, we refuse, and say what helps. Nothing is refused where nothing was to train."""
    model, bank = banked()
    batch = inputs_of(model)
    turn_on(model, True)
    model.disable_input_require_grads()
    with noted_as_usual():
        for route in ("a", ["a", None], Route.tokens(["a", "b"], torch.arange(14) % 2)):
            text = r"requires no gradient.*never train.*enable_input_require_grads"
            with bank.use(route), pytest.raises(RouteError, match=text):
                model(**batch)
        with bank.use(None):
            model(**batch)
        with bank.use("a"), torch.no_grad():
            model(**batch)
        bank["a"].requires_grad_(False)
        with bank.use("a"):
            model(**batch)
        bank["a"].requires_grad_(True)
    nudge(bank.add("e", LoRA(r=2, target_modules=("embed_tokens", "q_proj"))))
    with bank.use("e"):
        model(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in bank.parameters("e"))


class Stack(nn.Module):
    """Two blocks of two layers, with a way of checkpointing that a test chooses."""

    def __init__(self, way: Callable[[Stack, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)
        )
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.way(self, block, x)
        return x


def whole(stack: Stack, block: nn.Module, x: Tensor) -> Tensor:
    return x + block(x)


def each_layer(use_reentrant: bool) -> Callable[[Stack, nn.Module, Tensor], Tensor]:
    def way(stack: Stack, block: nn.Module, x: Tensor) -> Tensor:
        y = x
        for layer in block:  # type: ignore[attr-defined]
            y = checkpoint(layer, y, use_reentrant=use_reentrant)
        return x + y

    return way


def in_a_lambda(use_reentrant: bool) -> Callable[[Stack, nn.Module, Tensor], Tensor]:
    return lambda stack, block, x: checkpoint(lambda t: t + block(t), x, use_reentrant=use_reentrant)


def nested(use_reentrant: bool) -> Callable[[Stack, nn.Module, Tensor], Tensor]:
    def way(stack: Stack, block: nn.Module, x: Tensor) -> Tensor:
        def outer(t: Tensor) -> Tensor:
            return t + checkpoint(block, t, use_reentrant=use_reentrant)

        out: Tensor = checkpoint(outer, x, use_reentrant=use_reentrant)
        return out

    return way


def after_a_product(use_reentrant: bool) -> Callable[[Stack, nn.Module, Tensor], Tensor]:
    return lambda stack, block, x: x + checkpoint(lambda t: block(t * 1.0), x, use_reentrant=use_reentrant)


WAYS: dict[str, Callable[[bool], Callable[[Stack, nn.Module, Tensor], Tensor]]] = {
    "each-layer": each_layer,
    "lambda": in_a_lambda,
    "nested": nested,
}


def stack_gradients(
    way: Callable[[Stack, nn.Module, Tensor], Tensor],
    x: Tensor,
    call: Any = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Any:
    torch.manual_seed(0)
    model = Stack(way).double()
    bank = attach(model)
    for seed, (name, method) in enumerate({"a": LoRA(r=2), "b": DoRA(r=3)}.items()):
        nudge(bank.add(name, method, seed=seed), seed=seed)
    with bank.use(["a", "b", None]):
        loss = (model(x) if call is None else call(model, x)).square().sum()
    backward(loss)
    return slopes(bank)


@KINDS
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_by_hand(way: str, reentrant: bool) -> None:
    """A checkpoint around a lone layer, in a lambda or inside another one gives the plain gradients."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert same(stack_gradients(whole, x), stack_gradients(WAYS[way](reentrant), x))


def test_a_checkpoint_that_computes_what_its_layers_see() -> None:
    """What enters a layer was made inside the checkpoint, so nobody has seen it in forward: the node that asks tells the route. The
    reentrant kind, whose inside has no gradients at all, is refused."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    expected = stack_gradients(whole, x)
    assert same(expected, stack_gradients(after_a_product(False), x))
    with pytest.raises(RouteError, match="under reentrant activation checkpointing"):
        stack_gradients(after_a_product(True), x)


@pytest.mark.parametrize("way", ["each-layer", "lambda", "nested"])
def test_backward_in_another_thread(way: str) -> None:
    """As on a GPU, whose backward has a thread of its own: there the tensors tell the route, or it is an error of ours."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    expected = stack_gradients(whole, x)

    def elsewhere(loss: Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()

    assert same(expected, stack_gradients(WAYS[way](False), x, backward=elsewhere))
    with pytest.raises(RouteError, match="runs again in backward"):
        stack_gradients(after_a_product(False), x, backward=elsewhere)


@KINDS
def test_a_checkpoint_around_the_whole_model(reentrant: bool) -> None:
    """The call of the whole model is what runs again."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    expected = stack_gradients(whole, x)
    found = stack_gradients(whole, x, lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    assert same(expected, found)


@KINDS
def test_a_checkpoint_around_a_language_model(reentrant: bool) -> None:
    """The input is token ids, the same in every step; with dropout each step still gets its own mask."""
    model, bank = banked(dropout=0.3)
    ids = inputs_of(model)["input_ids"]
    model.train()
    nudge(bank.add("e", LoRA(r=2, target_modules="embed_tokens")))
    found = []
    for wrapped in (False, True):
        for name in bank:
            bank[name].draws = 0
        for _ in range(3):
            with bank.use({"a": 1, "b": 1, "e": 1}):
                if wrapped:
                    start = torch.zeros(1, dtype=torch.float64, requires_grad=True)
                    out = checkpoint(
                        lambda ids, start: model(input_ids=ids).logits + start, ids, start, use_reentrant=reentrant
                    )
                else:
                    out = model(input_ids=ids).logits
            out.square().mean().backward()
            found.append(slopes(bank))
    assert all(same(found[step], found[step + 3]) for step in range(3))
    assert not same(found[0], found[1])


@KINDS
def test_the_same_input_tensor_in_every_step(reentrant: bool) -> None:
    """Inputs that live on from step to step do not mix up the passes that they went through."""
    model, bank = banked(dropout=0.3)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    found = []
    for on in (False, True):
        bank["a"].draws = 0
        model.train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for _ in range(12):
            with bank.use("a"):
                model(inputs_embeds=x).logits.square().mean().backward()
            found.append(slopes(bank))
    assert all(same(found[step], found[step + 12]) for step in range(12))


@KINDS
def test_one_input_under_two_routes_at_once(reentrant: bool) -> None:
    """Two forwards of one tensor under different routes before one backward: the node that asks tells them apart."""
    model, bank = banked()
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    found = []
    for on in (False, True):
        model.train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        total = torch.zeros((), dtype=torch.float64)
        for route in ("a", ["b", None]):
            with bank.use(route):
                total = total + model(inputs_embeds=x).logits.square().mean()
        total.backward()
        found.append(slopes(bank))
    assert same(*found)


@KINDS
def test_the_base_alone_under_checkpointing(reentrant: bool) -> None:
    """A model with adapters on it, run without any: gradients of its input are the base's, and adapters get none."""
    model, bank = banked()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    grads = []
    for on in (False, True):
        model.train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        leaf = x.clone().requires_grad_()
        loss = model(inputs_embeds=leaf).logits.square().mean()
        with bank.use("a"):
            loss.backward()
        grads.append(leaf.grad)
        assert all(p.grad is None for p in bank.parameters("a"))
    assert torch.allclose(grads[0], grads[1], rtol=1e-10, atol=1e-14)


@KINDS
def test_accumulation_over_forwards_before_backwards(reentrant: bool) -> None:
    """Three forwards under three routes, then three backwards in another order."""
    model, bank = banked(dropout=0.2)
    found = []
    for on in (False, True):
        model.train()
        for name in bank:
            bank[name].draws = 0
        if on:
            turn_on(model, reentrant)
        losses = []
        for seed, route in enumerate((["a", "b"], "b", ["b", "a"])):
            with bank.use(route):
                losses.append(model(**inputs_of(model, seed=seed)).logits.square().mean())
        for at in (1, 2, 0):
            losses[at].backward()
        found.append(slopes(bank))
    assert same(*found)


@KINDS
def test_a_forward_of_its_own_in_backward(reentrant: bool) -> None:
    """A hook that runs the model under a route of its own while gradients are computed gets that route, and disturbs nothing."""
    model, bank = banked()
    batch = inputs_of(model)
    with torch.no_grad(), bank.use("b"):
        wanted = model.eval()(**batch).logits
    found: list[Tensor] = []
    grads = []

    def look(grad: Tensor) -> None:
        with noted_as_usual(), torch.no_grad(), bank.use("b"):
            found.append(model(**batch).logits)

    for hooked in (False, True):
        turn_on(model, reentrant)
        with bank.use("a"):
            logits = model(**batch).logits
        if hooked:
            logits.register_hook(look)
        logits.square().mean().backward()
        grads.append(slopes(bank))
    assert len(found) == 1 and torch.allclose(found[0], wanted, rtol=1e-12, atol=1e-12)
    assert same(*grads)


def test_memory_does_not_grow() -> None:
    """What is remembered of past passes goes when their tensors go."""
    model, bank = banked()
    turn_on(model, False)
    ids = inputs_of(model)
    for _ in range(60):
        with bank.use("a"):
            model(**ids).logits.square().mean().backward()
    noted = bank.runtime.tracker.inputs._noted
    living = [passes for ref, passes in noted.values() if not ref.expired()]
    assert len(noted) <= 1100 and len(living) < 10
    assert all(len(passes) <= 8 and not one.norms for passes in living for one in passes)
