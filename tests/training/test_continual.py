"""Learning one thing after another: on top of frozen adapters, and out of the way of what they read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.made import QUIET, World, digest, options
from torch import Tensor

from veneer.adapters import Adapter, LoRA
from veneer.checkpoints import attach, read_adapter
from veneer.data.chat.render import Renderer
from veneer.data.dataset import load_examples
from veneer.errors import AdapterError, CheckpointError
from veneer.evaluate.losses import example_losses
from veneer.models.flat import FlatRunner
from veneer.models.load import Base
from veneer.training import RunResult, train
from veneer.training.loop.orthogonal import Penalty, Projection

RATE = {"learning_rate": 3e-2, "warmup_steps": 0, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def first(place: Path, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the others build on; each test copies what it changes."""
    out = tmp_path_factory.mktemp("runs") / "first"
    train(options(place, out, **RATE), console=QUIET, base=base)
    return out


def run(place: Path, base: Base, out: Path, **more: Any) -> RunResult:
    return train(options(place, out, **{**RATE, "seed": 5, **more}), console=QUIET, base=base)


def same_tensors(one: Path | None, other: Path | None) -> bool:
    assert one is not None and other is not None
    return read_adapter(one).meta["digest"] == read_adapter(other).meta["digest"]


def overlap(one: Adapter, other: Adapter) -> float:
    """sum_sites ||A_1 A_2^T||_F^2."""
    return sum(
        float((own["lora_A"] @ other.tensors[site]["lora_A"].T).detach().square().sum())
        for site, own in one.tensors.items()
    )


def pair(*ranks: int) -> tuple[World, list[Adapter]]:
    """A tiny world with adapters of these ranks whose factors all hold something."""
    world = World()
    for i, r in enumerate(ranks):
        world.job(f"a{i}", LoRA(r=r), seed=i)
    return world, [world.bank[f"a{i}"] for i in range(len(ranks))]


def test_the_penalty_is_its_gradient() -> None:
    """What is added to A's gradient is the derivative of weight * sum_i ||A_i A^T||_F^2, over several old adapters of any rank."""
    _, (new, *old) = pair(3, 2, 4)
    new.requires_grad_(True)
    total = torch.zeros(())
    for site, own in new.tensors.items():
        for other in old:
            total = total + (other.tensors[site]["lora_A"].detach() @ own["lora_A"].T).square().sum()
    factors = [own["lora_A"] for own in new.tensors.values()]
    wanted = torch.autograd.grad(0.7 * total, factors)
    figures = Penalty(new, old, 0.7).adjust_gradients()
    assert figures["overlap"] == pytest.approx(float(total.detach()), rel=1e-5)
    for a, gradient in zip(factors, wanted, strict=True):
        assert a.grad is not None and torch.allclose(a.grad, gradient, rtol=1e-5, atol=1e-7)


def test_the_projection_leaves_nothing_along_the_old() -> None:
    """Start, gradients and steps have no component along any row of an old A; what stands in the complement already is not touched."""
    _, (new, *old) = pair(3, 2, 4)
    projection = Projection(new, old)
    assert max(overlap(new, other) for other in old) < 1e-10
    before = {site: own["lora_A"].detach().clone() for site, own in new.tensors.items()}
    projection.after_step()
    for site, own in new.tensors.items():
        assert torch.allclose(own["lora_A"].detach(), before[site], atol=1e-6)
        own["lora_A"].grad = torch.randn(own["lora_A"].shape, generator=torch.Generator().manual_seed(0))
    projection.adjust_gradients()
    for site, own in new.tensors.items():
        gradient: Tensor | None = own["lora_A"].grad
        assert gradient is not None and float(gradient.norm()) > 0.1
        for other in old:
            assert float((gradient @ other.tensors[site]["lora_A"].detach().T).abs().max()) < 1e-5


def test_orthogonal_runs(place: Path, base: Base, first: Path, tmp_path: Path) -> None:
    """Beside a plain run the penalty ends with less overlap and the projection with none; the figures tell it step by step."""
    old = read_adapter(first / "adapter")
    ends = {}
    for name, more in {
        "plain": {},
        "penalty": {"orthogonal_to": (first,), "orthogonal_weight": 5.0},
        "projection": {"orthogonal_to": (first,), "orthogonal": "projection"},
    }.items():
        result = run(place, base, tmp_path / name, **more)
        ends[name] = overlap(read_adapter(result.adapter), old)
        lines = (tmp_path / name / "metrics").glob("*.jsonl").__next__().read_text().splitlines()
        told = [json.loads(line).get("overlap") for line in lines if "grad_norm" in line]
        assert (told[-1] is None) == (name == "plain")
    assert ends["projection"] < 1e-9 * ends["plain"]
    assert ends["penalty"] < 0.5 * ends["plain"]
    made_of = read_adapter(tmp_path / "penalty" / "adapter").meta["receipt"]
    assert made_of["orthogonal"] == "penalty" and len(made_of["orthogonal_to"][0]["sha256"]) == 64


def test_one_seed_for_every_task(place: Path, base: Base, first: Path, tmp_path: Path) -> None:
    """A new adapter does not begin as the one that it builds on, although both have the seed that is the default; it begins the same each
    time."""
    seed = int(read_adapter(first / "adapter").meta["receipt"]["seed"])
    start: dict[str, Any] = {"seed": seed, "steps": 1, "learning_rate": 1e-9}
    old = run(place, base, tmp_path / "old", **start)
    for more in ({"on_top_of": (first,)}, {"orthogonal_to": (first,)}):
        one, other = (run(place, base, tmp_path / f"{i}-{next(iter(more))}", **start, **more) for i in (1, 2))
        assert same_tensors(one.adapter, other.adapter)
        starts = [
            torch.cat([own["lora_A"].detach().flatten() for own in read_adapter(out).tensors.values()])
            for out in (one.adapter, old.adapter)
        ]
        assert abs(float(torch.nn.functional.cosine_similarity(*starts, dim=0))) < 0.3


def test_on_top_of_frozen_adapters(place: Path, base: Base, first: Path, tmp_path: Path) -> None:
    """Training begins where the old adapter ended and lowers the loss from there; the old one's files and the base stay as they are."""
    files = {file: file.read_bytes() for file in (first / "adapter").iterdir()}
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    result = run(place, base, tmp_path / "second", on_top_of=(first,), valid=(place / "valid.jsonl",), eval_every=6)
    looks = dict(next(iter(result.jobs.values())).losses)
    bank = attach(base.model)
    try:
        bank.load(first / "adapter", name="old")
        bank.load(result.adapter, name="new")
        examples, _ = load_examples([place / "valid.jsonl"], Renderer(base.tokenizer))
        runner = FlatRunner(base.model)

        def loss(route: Any) -> float:
            return example_losses(runner, examples[:], bank=bank, route=route).mean

        assert looks[0] == pytest.approx(loss("old"), abs=1e-5)
        assert looks[12] == pytest.approx(loss({"old": 1.0, "new": 1.0}), abs=1e-5)
        assert abs(loss("new") - looks[12]) > 1e-3
    finally:
        bank.detach()
    assert {file: file.read_bytes() for file in (first / "adapter").iterdir()} == files
    assert all(torch.equal(value, weights[name]) for name, value in base.model.state_dict().items())
    receipt = read_adapter(result.adapter).meta["receipt"]
    assert receipt["on_top_of"][0]["name"] == "first" and len(receipt["on_top_of"][0]["sha256"]) == 64


@pytest.mark.parametrize("orthogonal", ["penalty", "projection"])
def test_a_run_that_goes_on_ends_with_the_same_bits(
    place: Path, base: Base, first: Path, tmp_path: Path, orthogonal: str
) -> None:
    """Stopped at a checkpoint and taken up again, a run that builds on another ends as the one that was never stopped."""
    more: dict[str, Any] = {"on_top_of": (first,), "orthogonal_to": (first,), "orthogonal": orthogonal, "name": "x"}
    run(place, base, tmp_path / "whole", **more)
    run(place, base, tmp_path / "again", **more)
    train(
        options(place, tmp_path / "again", **{**RATE, "seed": 5, **more}),
        console=QUIET,
        base=base,
        resume_from="step-00000010",
    )
    assert digest(tmp_path / "whole") == digest(tmp_path / "again")


def test_what_is_built_on_must_be_what_it_was(place: Path, base: Base, first: Path, tmp_path: Path) -> None:
    """A run that goes on refuses an adapter that changed meanwhile."""
    old = tmp_path / "old"
    shutil.copytree(first / "adapter", old)
    run(place, base, tmp_path / "second", on_top_of=(old,), steps=6)
    shutil.rmtree(old)
    shutil.copytree(first / "adapter", old)
    (old / "adapter_config.json").write_text((old / "adapter_config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"on_top_of|built"):
        train(
            options(place, tmp_path / "second", **{**RATE, "seed": 5, "on_top_of": (old,), "steps": 6}),
            console=QUIET,
            base=base,
            resume_from="step-00000005",
        )


def test_what_cannot_be_built_on(place: Path, base: Base, first: Path, tmp_path: Path) -> None:
    """No adapter there, no site in common, or nothing left to learn: one sentence, and no run is begun."""
    (tmp_path / "empty").mkdir()
    narrow = tmp_path / "narrow"
    run(place, base, narrow, target_modules=("q_proj",))
    wide = tmp_path / "wide"
    run(place, base, wide, r=16)
    for more, says in (
        ({"on_top_of": (tmp_path / "empty",)}, "holds no adapter"),
        ({"orthogonal_to": (tmp_path / "gone",)}, "holds no adapter"),
        ({"orthogonal_to": (narrow,), "target_modules": ("v_proj",)}, "no site in common"),
        ({"orthogonal_to": (wide,), "orthogonal": "projection"}, "leave none to learn"),
    ):
        with pytest.raises((CheckpointError, AdapterError), match=says):
            run(place, base, tmp_path / "out", **more)
        assert not (tmp_path / "out" / "checkpoints").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
