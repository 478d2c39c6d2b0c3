"""Forms of operations on a GPU: what is chosen, that each gives the reference's results, and that a run keeps its choice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.devices import PretendDevice
from tests.kernels.reference_varlen import reference_varlen
from tests.training.made import QUIET, World, apart, examples, options

from veneer.adapters import DoRA, LoRA
from veneer.data.batch import make_batch
from veneer.kernels import cross_entropy
from veneer.kernels.attention import segmented
from veneer.kernels.attention import varlen as varlen_file
from veneer.kernels.forms import Forms, forms, use_forms
from veneer.kernels.lora.grouped import GroupedBranch
from veneer.training import train
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import Trainer
from veneer.training.planning import gpu_forms
from veneer.training.planning.gpu_forms import BaseSizes, ManyAdapters, choose_forms, chunk_for, is_equal_and_faster
from veneer.training.run import decisions

SIZES = BaseSizes(32, 64, 4, 2, 8, torch.float32, torch.device("cpu"))


@pytest.fixture
def pretend() -> Iterator[PretendDevice]:
    """A device that does not exist."""
    with PretendDevice() as device:
        yield device


def gradients(world: World, names: list[str]) -> list[torch.Tensor]:
    """Gradients of a step in which every job has two rows, longer than those that are grouped on a CPU."""
    rows = examples(2 * len(names), seed=3, shortest=70, longest=80)
    world.stepper.forward_backward(make_batch(rows, [names[i % len(names)] for i in range(len(rows))]))
    return [p.grad.clone() for name in names for p in world.bank.parameters(name) if p.grad is not None]


def world_with_jobs(names: list[str]) -> World:
    """LoRA and DoRA jobs."""
    made = World(num_hidden_layers=2)
    for number, name in enumerate(names):
        made.job(name, (DoRA if number % 2 else LoRA)(r=4), seed=number)
    return made


def test_grouped_products_of_long_segments(pretend: PretendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, adapters with up to ``grouped_tokens`` tokens share their products; gradients are those of separate ones."""
    names, taken = ["a", "b", "c", "d"], list[tuple[int, int]]()
    run = GroupedBranch.run_
    monkeypatch.setattr(GroupedBranch, "run_", lambda self, *args: (taken.append(self.grid.shape), run(self, *args))[1])
    found = {}
    for most in (64, 4096):
        made = world_with_jobs(names)
        made.model.to(pretend.device)
        with use_forms(Forms(grouped_tokens=most)):
            found[most] = gradients(made, names)
        assert bool(taken) == (most == 4096)
    assert {count for count, _ in taken} == {2} and all(size > 64 for _, size in taken)
    assert apart(found[4096], found[64]) < 1e-5


def test_a_step_with_the_kernel_for_several_lengths(pretend: PretendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose attention goes through the kernel in one call a layer has the gradients of the plain form."""
    calls: list[Any] = []
    monkeypatch.setattr(varlen_file, "_kernel", lambda: (reference_varlen(calls), frozenset({"enable_gqa"})))
    monkeypatch.setattr(segmented, "takes_varlen", lambda *tensors: True)
    found = {}
    for form in ("plain", "varlen"):
        made = world_with_jobs(["a", "b"])
        made.model.to(pretend.device)
        with use_forms(Forms(attention=form)):
            found[form] = gradients(made, ["a", "b"])
        assert len(calls) == (2 if form == "varlen" else 0)
    assert apart(found["varlen"], found["plain"]) < 1e-5


def test_both_forms_of_many_adapters_agree() -> None:
    """The trial that decides compares equal things."""
    trial = ManyAdapters(SIZES, adapters=3, each=5)
    both = [[t.detach() for t in form()] for form in (trial.at_once, trial.one_by_one)]
    assert len(both[0]) == 8 and apart(*both) < 1e-5


def test_a_form_pays_if_it_is_right_and_faster() -> None:
    """A form that is slower, wrong or not there is not chosen."""
    x = torch.ones(3)

    def late() -> list[torch.Tensor]:
        time.sleep(0.002)
        return [x]

    def broken() -> list[torch.Tensor]:
        raise RuntimeError("no such kernel")

    assert is_equal_and_faster(lambda: [x], late, SIZES)
    assert not is_equal_and_faster(late, lambda: [x], SIZES)
    assert not is_equal_and_faster(lambda: [x + 1e-3], late, SIZES)
    assert not is_equal_and_faster(broken, late, SIZES)


def test_the_most_tokens_that_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes grow until separate products are faster."""
    tried: list[int] = []

    class Trial:
        at_once = one_by_one = None

        def __init__(self, sizes: BaseSizes, *, adapters: int, each: int) -> None:
            tried.append(each)

    monkeypatch.setattr(gpu_forms, "ManyAdapters", Trial)
    monkeypatch.setattr(gpu_forms, "is_equal_and_faster", lambda *args: tried[-1] <= 512)
    assert gpu_forms.grouped_tokens(SIZES) == 512 and tried == [128, 256, 512, 1024]


def test_the_choice(pretend: PretendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has the references. A device has what is_equal_and_faster, a chunk by its free memory, and no compiler for a short run."""
    model: Any = World().model
    assert choose_forms(model, tokens=64, steps=9000, option=True) == Forms()
    model.to(pretend.device)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name, answer in (("attention_pays", True), ("compiling_pays", True), ("grouped_tokens", 256)):
        monkeypatch.setattr(gpu_forms, name, lambda *args, answer=answer: answer)
    long = choose_forms(model, tokens=64, steps=9000, option="auto")
    assert long == Forms("varlen", "compiled", 256, 2**30)
    assert choose_forms(model, tokens=64, steps=10, option="auto").elementwise == "plain"
    assert choose_forms(model, tokens=64, steps=10, option=True).elementwise == "compiled"
    assert choose_forms(model, tokens=64, steps=9000, option=False) == Forms(loss_chunk=2**30)
    assert [chunk_for(free) for free in (0, 2**31, 2**40)] == [48 * 2**20, 2**28, 2**30]


def test_the_chunk_of_the_loss(pretend: PretendDevice) -> None:
    """On a device the chosen size is taken; on a CPU never."""
    with use_forms(Forms(loss_chunk=1000)):
        assert cross_entropy._chunk_bytes(pretend.device) == 1000
        assert cross_entropy._chunk_bytes(torch.device("cpu")) == 48 * 2**20
    assert cross_entropy._chunk_bytes(pretend.device) > 1000


def test_a_run_keeps_its_choice(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms are stored with the run, used in its passes alone, and taken again when it resumes, whatever would be chosen now."""
    used: list[Forms] = []
    between: list[Forms] = []
    loss, take = Stepper._loss, Trainer.round
    monkeypatch.setattr(Stepper, "_loss", lambda self, *args: (used.append(forms()), loss(self, *args))[1])
    monkeypatch.setattr(Trainer, "round", lambda self: (between.append(forms()), take(self))[1])
    first, second = Forms(grouped_tokens=128), Forms(grouped_tokens=256)
    monkeypatch.setattr(decisions, "choose_forms", lambda *args, **kwargs: first)
    given = options(place, tmp_path / "run", steps=4, save_every=2)
    train(**{**given, "steps": 2}, console=QUIET)
    monkeypatch.setattr(decisions, "choose_forms", lambda *args, **kwargs: second)
    train(**given, console=QUIET)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["forms"]["grouped_tokens"] == 128
    assert len(used) >= 4 and {*used} == {first} and between == [Forms()] * 4
