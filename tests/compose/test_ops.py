"""The operations against slow dense references that are written from the papers' formulas."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tests.compose.made import METHODS, trained
from tests.tiny import tiny
from torch import Tensor, nn

from veneer.adapters import Adapter, DoRA, LoRA
from veneer.compose.combine import Composition, combine
from veneer.compose.ops import OPERATIONS, OperationSettings
from veneer.deltas.build import assemble, site_tensors
from veneer.deltas.delta import SiteDelta, Weights, site_delta, weighted_sum
from veneer.deltas.parents import Parent
from veneer.deltas.svd import truncated
from veneer.errors import ComposeError

SITE = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny base."""
    return tiny("llama")


def weights_of(model: nn.Module) -> Weights:
    def weight(site: str) -> Tensor:
        module = model.get_submodule(site)
        stored: Tensor = module.weight.detach()
        return stored.T if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D" else stored.flatten(1)

    return weight


def dense(adapter: Adapter, site: str, model: nn.Module) -> Tensor:
    """W' - W by its definition, in fp64."""
    weight = weights_of(model)(site).double()
    a, b = (value.detach().double().flatten(1) for value in list(adapter.tensors[site].values())[:2])
    moved = weight + adapter.scale(site) * b @ a
    if not adapter.method.needs_base_weights:
        return moved - weight
    m = adapter.tensors[site]["lora_magnitude_vector"].detach().double()
    return (m / moved.norm(dim=1)).unsqueeze(1) * moved - weight


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def run(operation: str, model: nn.Module, *parents: tuple[Adapter, float], **options: object) -> Composition:
    made = [Parent(adapter, weight) for adapter, weight in parents]
    return combine(operation, made, weights=weights_of(model), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations_with_replacement(METHODS, 2)))
def test_sums_are_exact(model: nn.Module, one: str, other: str) -> None:
    """The sum of any two methods is within 1e-6 of the dense one as a value, and as near as fp32 can hold it as an adapter."""
    a, b = trained(model, METHODS[one], name="a"), trained(model, METHODS[other], name="b", seed=7)
    made = run("sum", model, (a, 0.7), (b, -0.4))
    assert made.adapter.method.needs_base_weights == ("dora" in (one, other))
    for site in a.tensors:
        wanted = 0.7 * dense(a, site, model) - 0.4 * dense(b, site, model)
        weight = weights_of(model)(site)
        value = weighted_sum([site_delta(x, site, weights_of(model)) for x in (a, b)], [0.7, -0.4])
        assert relative(value.dense(weight), wanted) < 1e-6
        assert "dora" in (one, other) or relative(dense(made.adapter, site, model), wanted) < 1e-6
        assert float((dense(made.adapter, site, model) - wanted).norm()) < 3e-7 * float(weight.norm() + wanted.norm())
    assert made.error < 1e-5


@pytest.mark.parametrize("arch", ["gpt2", "bert"])
def test_sums_on_other_kinds_of_layers(arch: str) -> None:
    """Conv1D layers and embeddings, under LoRA and DoRA, sum as linear layers do."""
    model = tiny(arch)
    targets = ("wte", "c_attn", "c_proj") if arch == "gpt2" else ("word_embeddings", "query", "decoder")
    a = trained(model, LoRA(r=3, target_modules=targets), name="a")
    b = trained(model, DoRA(r=2, target_modules=targets), name="b", seed=3)
    made = run("sum", model, (a, 1.0), (b, 0.5))
    for site in a.tensors:
        wanted = dense(a, site, model) + 0.5 * dense(b, site, model)
        assert relative(dense(made.adapter, site, model), wanted) < 1e-5


def test_convolutions_sum() -> None:
    """A convolution's factors keep their kernel."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    parts = [
        trained(model, method, name=name, seed=i)
        for i, (name, method) in enumerate(
            {"a": LoRA(r=2, target_modules=("0",)), "b": DoRA(r=3, target_modules=("0",))}.items()
        )
    ]
    made = run("sum", model, (parts[0], 2.0), (parts[1], 1.0))
    assert made.adapter.tensors["0"]["lora_A"].shape == (5, 3, 3, 3)
    wanted = 2 * dense(parts[0], "0", model) + dense(parts[1], "0", model)
    assert relative(dense(made.adapter, "0", model), wanted) < 1e-5


def test_truncation_is_the_optimum(model: nn.Module) -> None:
    """Cut to a rank, a sum has the error of the dense SVD's optimum, which is what is reported; no dense SVD is made of factors."""
    a, b = trained(model, name="a"), trained(model, LoRA(r=6), name="b", seed=7)
    made = run("sum", model, (a, 1.0), (b, 1.0), rank=5)
    for site in made.sites:
        wanted = dense(a, site.site, model) + dense(b, site.site, model)
        s = torch.linalg.svdvals(wanted)
        best = float(s[5:].norm() / s.norm())
        assert site.rank == 5 and site.error == pytest.approx(best, abs=1e-6)
        assert relative(dense(made.adapter, site.site, model), wanted) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_dora_cut_to_a_rank(model: nn.Module, form: str) -> None:
    """As LoRA, a DoRA change takes the optimum of its dense matrix; as DoRA its gain stays whole, and the error is smaller."""
    a, b = trained(model, METHODS["dora"], name="a"), trained(model, METHODS["lora"], name="b", seed=7)
    made = run("sum", model, (a, 1.0), (b, 1.0), rank=4, form=form)
    for site in made.sites:
        wanted = dense(a, site.site, model) + dense(b, site.site, model)
        s = torch.linalg.svdvals(wanted)
        found = relative(dense(made.adapter, site.site, model), wanted)
        assert site.rank == 4 and site.error == pytest.approx(found, abs=1e-5)
        if form == "lora":
            assert found == pytest.approx(float(s[4:].norm() / s.norm()), abs=1e-6)
        else:
            assert found < float(s[4:].norm() / s.norm())


def test_energy_chooses_the_least_rank(model: nn.Module) -> None:
    """A share of energy keeps the fewest singular values that reach it, site by site."""
    a = trained(model, LoRA(r=12), name="a")
    made = run("sum", model, (a, 1.0), energy=0.9)
    for site in made.sites:
        s = torch.linalg.svdvals(dense(a, site.site, model)).square()
        assert float(s[: site.rank].sum()) >= 0.9 * float(s.sum()) > float(s[: site.rank - 1].sum())
    assert len({site.rank for site in made.sites}) > 1
    assert run("sum", model, (a, 1.0), energy=1.0).error < 1e-6


def test_sums_do_not_depend_on_order(model: nn.Module) -> None:
    """Sums of values are associative and commute exactly in their terms, and their matrices agree to rounding."""
    parts = [site_delta(trained(model, METHODS[m], seed=i), SITE, weights_of(model)) for i, m in enumerate(METHODS)]
    left = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    right = parts[0] + (parts[1] + (parts[2] + parts[3]))
    for one, other in zip(left.factors(), right.factors(), strict=True):
        assert torch.equal(one, other)
    weight = weights_of(model)(SITE)
    turned = weighted_sum(parts[::-1], [1, 1, 1, 1])
    assert relative(turned.dense(weight), left.dense(weight)) < 1e-14


def test_a_parent_taken_out_gives_the_other_back(model: nn.Module) -> None:
    """a + b - a is b: exactly as values, and to rounding through a folder's adapter, whose rank falls back to b's."""
    a, b = trained(model, name="a"), trained(model, METHODS["rslora"], name="b", seed=7)
    one, other = site_delta(a, SITE), site_delta(b, SITE)
    back = (one + other) - one
    assert back.rank == other.rank
    assert all(torch.equal(x, y) for x, y in zip(back.factors(), other.factors(), strict=True))
    both = run("sum", model, (a, 1.0), (b, 1.0)).adapter
    again = run("sum", model, (both, 1.0), (a, -1.0), energy=1 - 1e-9)
    for site in again.sites:
        assert site.rank == b.rank(site.site)
        assert relative(dense(again.adapter, site.site, model), dense(b, site.site, model)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_negation_removes_the_effect(model: nn.Module, method: str) -> None:
    """An adapter and its negation together change nothing beyond rounding; both in one composition are refused as empty."""
    a = trained(model, METHODS[method], name="a")
    negated = run("sum", model, (a, -1.0)).adapter
    for site in a.tensors:
        left = dense(a, site, model) + dense(negated, site, model)
        assert float(left.norm()) < 1e-6 * float(weights_of(model)(site).norm())
    with pytest.raises(ComposeError, match="nothing is left"):
        run("sum", model, (a, 1.0), (a, -1.0))
    with pytest.raises(ComposeError, match="cancel each other up to rounding"):
        run("sum", model, (a, 1.0), (negated, 1.0), (negated, -1e-9))


def slow_ties(changes: list[Tensor], density: float) -> Tensor:
    """TIES element by element: trim, elect, disjoint mean."""
    trimmed = []
    for change in changes:
        order = change.abs().flatten().sort(descending=True).values
        limit = order[round(density * change.numel()) - 1]
        trimmed.append(change * (change.abs() >= limit))
    out = torch.zeros_like(changes[0])
    for i, j in itertools.product(range(out.shape[0]), range(out.shape[1])):
        values = [float(t[i, j]) for t in trimmed]
        sign = math.copysign(1, sum(values)) if sum(values) else 0
        same = [v for v in values if v and math.copysign(1, v) == sign]
        out[i, j] = sum(same) / len(same) if same else 0.0
    return out


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5)])
def test_ties_is_the_papers(model: nn.Module, weights: tuple[float, ...]) -> None:
    """Trim, elect and disjoint mean as in Yadav et al., for LoRA and DoRA; equal weights of any size are the plain mean."""
    parts = [trained(model, METHODS[m], name=m, seed=i) for i, m in enumerate(("lora", "dora", "rslora"))]
    made = run(
        "ties", model, *zip(parts, weights, strict=True), settings=OperationSettings(density=0.3, scale=1.5), rank=32
    )
    wanted = 1.5 * slow_ties([dense(part, SITE, model) for part in parts], 0.3)
    assert relative(dense(made.adapter, SITE, model), wanted) < 1e-5


def test_ties_weighs_votes(model: nn.Module) -> None:
    """With weights the heavier voice elects the sign, and a negative weight turns an adapter around."""
    geometry = site_delta(trained(model), SITE).geometry
    up, down = torch.ones(geometry.out, geometry.in_), -0.5 * torch.ones(geometry.out, geometry.in_)
    parts = [SiteDelta(geometry, dense_OK=up), SiteDelta(geometry, dense_OK=down)]
    from veneer.compose.ops import SiteContext

    place = SiteContext(SITE, OperationSettings(density=1.0), lambda: None)
    ties = OPERATIONS["ties"].function
    assert torch.equal(ties(parts, [1, 1], place).dense(), up.double())
    assert torch.equal(ties(parts, [1, 3], place).dense(), down.double())
    assert torch.allclose(ties(parts, [1, -1], place).dense(), 0.75 * up.double())


def test_dare_is_the_sum_on_average(model: nn.Module) -> None:
    """Each element is dropped or rescaled, the draw depends on seed and site alone, and the mean over seeds is the sum."""
    parts = [(trained(model, name="a"), 0.6), (trained(model, METHODS["dora"], name="b", seed=3), 0.4)]
    wanted = sum(w * dense(x, SITE, model) for x, w in parts)
    assert isinstance(wanted, Tensor)
    draws = []
    for seed in range(80):
        made = run(
            "dare", model, *((x, w) for x, w in _only(parts)), settings=OperationSettings(drop=0.5, seed=seed), rank=32
        )
        draws.append(dense(made.adapter, SITE, model))
        if seed == 0:
            single = run("dare", model, _only(parts)[0], settings=OperationSettings(drop=0.5), rank=32)
            found, whole = dense(single.adapter, SITE, model), 0.6 * dense(parts[0][0], SITE, model)
            dropped = found.abs() < 1e-6 * whole.abs().max()
            assert 0.45 < float(dropped.float().mean()) < 0.55
            assert torch.allclose(found[~dropped], 2 * whole[~dropped], rtol=1e-3, atol=1e-6)
    assert relative(torch.stack(draws).mean(0), wanted) < 0.17
    assert torch.equal(
        draws[3],
        dense(
            run("dare", model, *_only(parts), settings=OperationSettings(drop=0.5, seed=3), rank=32).adapter,
            SITE,
            model,
        ),
    )


def _only(parts: list[tuple[Adapter, float]]) -> list[tuple[Adapter, float]]:
    """The same adapters at one site."""
    made = []
    for adapter, weight in parts:
        one = Adapter(
            adapter.name,
            adapter.method,
            {SITE: adapter.tensors[SITE]},
            {SITE: adapter.kinds[SITE]},
            alphas={SITE: adapter.alpha(SITE)},
        )
        made.append((one, weight))
    return made


def test_iso_c_is_the_papers(model: nn.Module) -> None:
    """The singular vectors of the sum with the mean of its singular values."""
    a, b = trained(model, name="a"), trained(model, LoRA(r=2), name="b", seed=7)
    made = run("iso-c", model, (a, 1.0), (b, 1.0))
    wanted = dense(a, SITE, model) + dense(b, SITE, model)
    u, s, vt = torch.linalg.svd(wanted, full_matrices=False)
    slow = float(s[:6].mean()) * u[:, :6] @ vt[:6]
    assert relative(dense(made.adapter, SITE, model), slow) < 1e-5
    with pytest.raises(ComposeError, match=r'iso-c .* "d" .* 32 of them .* rank 3 would keep 9% of the result'):
        run("iso-c", model, (trained(model, METHODS["dora"], name="d"), 1.0))
    full = run("iso-c", model, (trained(model, METHODS["dora"], name="d"), 1.0), rank=32)
    u, s, vt = torch.linalg.svd(dense(trained(model, METHODS["dora"]), SITE, model), full_matrices=False)
    assert relative(dense(full.adapter, SITE, model), float(s.mean()) * u @ vt) < 1e-4


@pytest.mark.parametrize("side", ["both", "out", "in"])
def test_outside_is_orthogonal(model: nn.Module, side: str) -> None:
    """What is left of the first is orthogonal to the others on the sides asked for, and what is already outside stays."""
    a, b, c = (trained(model, name=n, seed=i) for i, n in enumerate("abc"))
    made = run("outside", model, (a, 1.0), (b, 1.0), (c, 1.0), settings=OperationSettings(side=side))  # type: ignore[arg-type]
    left = dense(made.adapter, SITE, model)
    size = float(dense(a, SITE, model).norm())
    assert float(left.norm()) > 0.1 * size
    for other in (dense(b, SITE, model), dense(c, SITE, model)):
        if side != "in":
            assert float((other.T @ left).norm()) < 1e-5 * size * float(other.norm())
        if side != "out":
            assert float((left @ other.T).norm()) < 1e-5 * size * float(other.norm())
    again = run("outside", model, (made.adapter, 1.0), (b, 1.0), settings=OperationSettings(side=side))  # type: ignore[arg-type]
    assert relative(dense(again.adapter, SITE, model), left) < 1e-5
    with pytest.raises(ComposeError, match="nothing is left"):
        run("outside", model, (a, 1.0), (a, 1.0), settings=OperationSettings(side=side))  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["out", "in"])
def test_outside_a_delta_of_full_rank(model: nn.Module, side: str) -> None:
    """DoRA leaves nothing outside itself on both sides, nor where it spans the side asked for; elsewhere the rest is the projection of
    the first delta, LoRA or DoRA, cut to the parents' ranks."""
    dora, lora = trained(model, METHODS["dora"], name="d"), trained(model, name="l", seed=7)
    with pytest.raises(ComposeError, match='"d" has full rank, so no part of "l" lies outside it; give --side out'):
        run("outside", model, (lora, 1.0), (dora, 1.0))
    settings = OperationSettings(side=side)  # type: ignore[arg-type]
    made = run("outside", model, (lora, 1.0), (dora, 1.0), settings=settings)
    shapes = {site: weights_of(model)(site).shape for site in lora.tensors}
    assert set(made.adapter.tensors) == {s for s, (o, k) in shapes.items() if (o > k if side == "out" else k > o)}
    for site in made.adapter.tensors:
        one, other = dense(lora, site, model), dense(dora, site, model)
        one, other = (one, other) if side == "out" else (one.T, other.T)
        basis = torch.linalg.qr(other).Q
        wanted = one - basis @ (basis.T @ one)
        found = dense(made.adapter, site, model)
        assert relative(found if side == "out" else found.T, wanted) < 1e-5
    made = run("outside", model, (dora, 1.0), (lora, 1.0), settings=settings)
    for site in made.sites:
        one, other = dense(dora, site.site, model), dense(lora, site.site, model)
        one, other = (one, other) if side == "out" else (one.T, other.T)
        basis = torch.linalg.svd(other, full_matrices=False).U[:, :4]
        wanted = one - basis @ (basis.T @ one)
        s = torch.linalg.svdvals(wanted)
        assert site.rank == 7 and site.error == pytest.approx(float(s[7:].norm() / s.norm()), abs=1e-5)


def test_peft_linear_says_how_wrong_it_is(model: nn.Module) -> None:
    """The factor-wise form is PEFT's, cross terms included, and its error against the sum is told: about 100 % for strangers."""
    a, b = trained(model, name="a"), trained(model, name="b", seed=7)
    made = run("peft_linear", model, (a, 0.5), (b, -0.5))
    (a_a, b_a), (a_b, b_b) = ([v.double() for v in x.tensors[SITE].values()] for x in (a, b))
    scale = a.scale(SITE)
    root = math.sqrt(0.5 * scale)
    slow = root * (b_a + b_b) @ (root * (a_a - a_b))
    assert relative(dense(made.adapter, SITE, model), slow) < 1e-6
    wanted = 0.5 * dense(a, SITE, model) - 0.5 * dense(b, SITE, model)
    assert {s.site: s.error for s in made.sites}[SITE] == pytest.approx(relative(slow, wanted), rel=1e-5)
    assert made.error > 0.5
    with pytest.raises(ComposeError, match="one rank"):
        run("peft_linear", model, (a, 1.0), (trained(model, LoRA(r=2), name="c"), 1.0))


def test_gains_may_turn_and_vanish(model: nn.Module) -> None:
    """A sum whose gain is negative or zero at some rows is still the sum."""
    a = trained(model, METHODS["dora"], name="a")
    delta = site_delta(a, SITE, weights_of(model))
    assert delta.gain_O is not None
    gain = delta.gain_O.clone()
    gain[:3] = torch.tensor([-1.0, -1.5, -1 - 1e-9], dtype=torch.float64)
    change = SiteDelta(delta.geometry, delta.terms, gain)
    tensors = site_tensors(SITE, change, DoRA(), weights_of(model)(SITE))
    made = assemble({SITE: tensors}, {SITE: "linear"}, "x", method=DoRA())
    assert relative(dense(made, SITE, model), change.dense(weights_of(model)(SITE))) < 1e-5


def test_truncation_leaves_out_rounding() -> None:
    """A rank above what is there is not filled with noise."""
    geometry = site_delta(trained(tiny("llama")), SITE).geometry
    b, a = torch.randn(geometry.out, 2, dtype=torch.float64), torch.randn(2, geometry.in_, dtype=torch.float64)
    change = SiteDelta(geometry, dense_OK=b @ a)
    assert truncated(change, rank=8).rank in (2, 3)
    assert copy.copy(change).dense().equal(change.dense())


def test_bad_inputs_are_one_sentence(model: nn.Module) -> None:
    """Ranks that make no sense, empty and broken adapters, other shapes, other bases, a missing base."""
    a = trained(model, name="a")
    broken, fresh = trained(model, name="broken"), trained(model, name="fresh", size=0.0)
    with torch.no_grad():
        broken.tensors[SITE]["lora_A"][0, 0] = float("inf")
    other = trained(tiny("llama", intermediate_size=48), name="other")
    foreign = trained(model, name="foreign")
    for adapter, value in ((a, 1.0), (foreign, 2.0)):
        adapter.meta["receipt"] = {"base": {SITE: {"sketch": [value] * 8, "sha256": str(value)}}}
    for says, operation, parents, options in (
        ("rank: expected 1 or more, found 0", "sum", [(a, 1.0)], {"rank": 0}),
        ("rank 9 is above the maximum of the result, 4", "sum", [(a, 1.0)], {"rank": 9}),
        ("energy: expected a share", "sum", [(a, 1.0)], {"energy": 0.0}),
        ("holds values that are not finite", "sum", [(a, 1.0), (broken, 1.0)], {}),
        ("changes nothing", "ties", [(fresh, 1.0), (a, 1.0)], {}),
        ("layers of different shapes", "sum", [(a, 1.0), (other, 1.0)], {}),
        ("were made on different bases", "sum", [(a, 1.0), (foreign, 1.0)], {}),
        ("there is nothing to compose", "sum", [], {}),
        ("there is no operation 'mean'; choose from sum", "mean", [(a, 1.0)], {}),
        ("expected a finite number", "sum", [(a, math.inf)], {}),
        ("density: expected", "ties", [(a, 1.0)], {"settings": OperationSettings(density=0)}),
        ("drop: expected", "dare", [(a, 1.0)], {"settings": OperationSettings(drop=1)}),
        ("scale: expected a finite number", "sum", [(a, 1.0)], {"settings": OperationSettings(scale=math.nan)}),
        ("the change is larger than fp32 can hold", "sum", [(a, 1e300)], {}),
        ("the change is smaller than fp32 can hold", "sum", [(a, 1e-60)], {}),
        ("nothing is left", "outside", [(a, 0.0), (trained(model, seed=2), 1.0)], {}),
        (
            "side: expected",
            "outside",
            [(a, 1.0), (trained(model, seed=2), 1.0)],
            {"settings": OperationSettings(side="x")},
        ),
    ):
        with pytest.raises(ComposeError) as caught:
            run(operation, model, *parents, **options)  # type: ignore[arg-type]
        assert says in str(caught.value), says
    with pytest.raises(ComposeError, match="depends on the base weights"):
        combine("sum", [Parent(trained(model, METHODS["dora"], name="d"))])


def test_tied_heads_are_not_forgotten() -> None:
    """An adapter that acts on the tied head composes with its like, and not with one that leaves the head alone."""
    model = tiny("llama", tie_word_embeddings=True)
    method = LoRA(r=2, target_modules=("embed_tokens",), ensure_weight_tying=True)
    a, b = trained(model, method, name="a"), trained(model, method, name="b", seed=5)
    assert run("sum", model, (a, 1.0), (b, 1.0)).adapter.method.ensure_weight_tying
    loose = trained(model, LoRA(r=2, target_modules=("embed_tokens",)), name="c")
    with pytest.raises(ComposeError, match="tied head"):
        run("sum", model, (a, 1.0), (loose, 1.0))
