"""Whole runs on a device that only pretends to exist: no two devices meet, little is read back, and the results are those of a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.devices import DeviceMixError, PretendDevice
from tests.training.made import QUIET, Ear, World, apart, examples, figures, options, values

from veneer.adapters import DoRA, LoRA
from veneer.data.batch import make_batch
from veneer.errors import ConfigError, TrainingError
from veneer.kernels import cpp_library, cross_entropy
from veneer.kernels.lora import branch, dropout
from veneer.models.flat import FlatRunner
from veneer.training import train
from veneer.training.activation_checkpointing import activation_checkpointing
from veneer.training.loop import step
from veneer.training.loop.job import Job
from veneer.training.run.console import Console

STEPS = 4
READS = 1
"""Times that a job's step reads something back: losses and norms, together."""
READS_OF_AN_EVALUATION = 1
Trained = tuple[list[list[torch.Tensor]], dict[str, list[float]], list[str]]
"""Each job's tensors, its losses, and what was read back after the first step."""
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"methods": [DoRA(r=3)]},
    "dropout": {"methods": [LoRA(r=4, lora_dropout=0.3), DoRA(r=2, lora_dropout=0.1)]},
    "sgd": {"optimizer": "sgd"},
    "four jobs": {"methods": [LoRA(r=2), DoRA(r=3), LoRA(r=8, lora_dropout=0.1), DoRA(r=2)]},
    "soft cap": {"arch": "gemma2", "methods": [DoRA(r=2), LoRA(r=2)]},
    "windows": {"arch": "gemma3", "methods": [LoRA(r=2), DoRA(r=2)]},
    "conv1d": {"arch": "gpt2", "methods": [DoRA(r=2), LoRA(r=2)]},
    "adapted head": {"methods": [LoRA(r=2, target_modules=("q_proj", "lm_head")), LoRA(r=2)]},
    "padded rows": {"arch": "bloom", "methods": [LoRA(r=2, lora_dropout=0.1), DoRA(r=2)]},
    "checkpointing": {"methods": [LoRA(r=2, lora_dropout=0.1), DoRA(r=2)], "recompute": True},
    "overrides": {"methods": [LoRA(r=2, modules_to_save=("norm",), trainable_token_indices=(5, 6, 7)), LoRA(r=2)]},
}


@pytest.fixture(autouse=True)
def no_cpp_kernels() -> Iterator[None]:
    """They are for the CPU, which these results are compared with."""
    before = cpp_library.folder()
    cpp_library.use(None)
    yield
    cpp_library.use(before)


def trained(device: PretendDevice | None, case: dict[str, Any]) -> Trained:
    """Train the jobs of a case for a few steps with evaluations; returns their tensors and losses."""
    world, ear = World(case.get("arch", "llama")), Ear()
    if device is not None:
        world.model.to(device.device)
    jobs: list[Job] = []
    for number, method in enumerate(case.get("methods", [LoRA(r=4)])):
        held = examples(3, seed=50)
        more = {"held_out": held, "eval_every": 2, "optimizer": case.get("optimizer", "adamw"), "steps": STEPS}
        jobs.append(world.job(f"job{number}", method, seed=number, rows=examples(9, seed=number), **more))
    trainer = world.trainer(jobs, ear, budget=40, share=80)
    with activation_checkpointing(world.model, case.get("recompute", False)):
        trainer.round()
        if device is not None:
            device.reads.clear()
        trainer.run()
    reads = [] if device is None else list(device.reads)
    assert all(job.progress.step == STEPS and not job.reason for job in jobs), [job.reason for job in jobs]
    return [[value.cpu() for value in values(world, job.name)] for job in jobs], ear.losses, reads


def check_on_device(name: str, expected: Trained) -> None:
    """Train a case on the device: as on the CPU, and with few reads."""
    with PretendDevice() as device:
        found, losses, reads = trained(device, CASES[name])
    for job, values_of_job in losses.items():
        assert values_of_job == pytest.approx(expected[1][job], rel=1e-5)
    for one, other in zip(found, expected[0], strict=True):
        assert apart(one, other) < 1e-4
    count = len(found)
    evaluations = count * 2 * READS_OF_AN_EVALUATION
    assert len(reads) <= count * (STEPS - 1) * READS + count + evaluations, "too many reads:\n" + "\n".join(reads)


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_another_device(name: str) -> None:
    """Each method, layer kind and form trains as on the CPU: the same dropout, the same losses, and one read per job and step."""
    check_on_device(name, trained(None, CASES[name]))


def test_a_batch_is_moved_once() -> None:
    """A pass sends its tensors in one copy; indices of attention and of mixed routes follow, none of them once a layer."""
    world = World(num_hidden_layers=3)
    world.job("a")
    rows = examples(4)
    with PretendDevice() as device:
        world.model.to(device.device)
        world.stepper.forward_backward(make_batch(rows, "a"))
        with device.counting():
            losses = world.stepper.forward_backward(make_batch(rows, "a"))
            assert len(device.moves) <= 2 and not device.reads, device.moves
            assert losses["a"].loss > 0 and len(device.reads) == 1


def test_a_run_is_saved_and_resumes_on_another_device(place: Path, tmp_path: Path, capsys: Any) -> None:
    """A run that began on a GPU goes on on a CPU, says so, and ends as one that was on the CPU all along."""
    common = {"valid": (place / "valid.jsonl",), "eval_every": 6, "compile": False}
    train(options(place, tmp_path / "cpu", device="cpu", **common), console=QUIET)

    def after(console: Console, text: str, **_: Any) -> None:
        if text.startswith("step 8/"):
            raise KeyboardInterrupt

    run = options(place, tmp_path / "both", device="cuda", **common)
    with PretendDevice(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Console, "progress", after)
        with pytest.raises(KeyboardInterrupt):
            train(run, console=QUIET)
    train(options(place, tmp_path / "both", device="cpu", **common), console=Console())
    said = capsys.readouterr().out
    assert "changed since the run began: device cuda (a device that does not exist) -> cpu" in said
    lines = [figures(tmp_path / name / "metrics" / f"{name}.jsonl") for name in ("cpu", "both")]
    one, other = ([line.get("loss", line.get("held_out_loss")) for line in found] for found in lines)
    assert len(one) == 15 and one == pytest.approx(other, rel=1e-5)


def test_the_plan_knows_the_memory_of_the_device(place: Path, tmp_path: Path) -> None:
    """A run is planned against the memory of its GPU, and refused if it does not fit there."""
    from veneer.training.run.decisions import plan

    with PretendDevice() as device:
        device.used = 2 << 30
        found, _ = plan({**options(place, tmp_path / "a", device="cuda:1"), "plan": True})
        assert found.device == "cuda:1" and found.free == 24 << 30
        assert "of 25.77 GB available on cuda:1" in found.lines()[0]


def test_a_pass_that_does_not_fit_on_the_device_ends_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory on a GPU names what was too large and what fitted, frees the pass's tensors, and the other job goes on."""
    world, ear = World(), Ear()
    with PretendDevice() as device:
        world.model.to(device.device)
        jobs = [
            world.job("small", rows=examples(4, longest=5)),
            world.job("large", rows=examples(4, shortest=30, longest=30)),
        ]
        forward, freed = world.stepper.forward_backward, []

        def short(batch: Any, **rest: Any) -> Any:
            if "large" in batch.jobs and jobs[1].progress.step == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return forward(batch, **rest)

        monkeypatch.setattr(world.stepper, "forward_backward", short)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
        world.trainer(jobs, ear, share=0, budget=60).run()
    assert ear.ends == {"small": "finished", "large": "memory"} and freed
    assert "a pass of 60 tokens, the longest example 30, does not fit in memory on cuda:0, where 24." in jobs[1].reason
    assert "use tokens_per_pass 59, or activation_checkpointing" in jobs[1].reason


def test_a_device_that_has_failed_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that CUDA does not recover from is no job's own: none fails, so that all go on from the last checkpoint."""
    world, ear = World(), Ear()
    with PretendDevice() as device:
        world.model.to(device.device)
        jobs = [world.job("a"), world.job("b", seed=1)]
        forward = world.stepper.forward_backward

        def broken(*_: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA.")

        def second(batch: Any, **rest: Any) -> Any:
            if jobs[0].progress.step == 2:
                monkeypatch.setattr(torch.cuda, "synchronize", broken)
                broken()
            return forward(batch, **rest)

        monkeypatch.setattr(world.stepper, "forward_backward", second)
        with pytest.raises(
            TrainingError, match=r"^cuda:0 has failed: CUDA error: an illegal memory access was "
        ) as raised:
            world.trainer(jobs, ear).run()
    assert str(raised.value).endswith("encountered; run the same command to resume from the last checkpoint")
    assert raised.value.code == "device" and not ear.ends and all(job.running for job in jobs)


def test_a_device_that_is_not_there_is_one_sentence(place: Path, tmp_path: Path) -> None:
    """Before anything is loaded, the device is named with the reason and the remedy."""
    with pytest.raises(
        ConfigError, match=r"device: cuda cannot be used: PyTorch .* is built without CUDA; install .*, or use cpu"
    ):
        train(options(place, tmp_path / "a", device="cuda"), console=QUIET)
    with PretendDevice(), pytest.raises(ConfigError, match="cuda:7 does not exist: this machine has cuda:0 to cuda:1"):
        train(options(place, tmp_path / "a", device="cuda:7"), console=QUIET)
    with pytest.raises(ConfigError, match="device: expected auto, cpu, cuda, cuda:N or mps, found 'gpu'"):
        train(options(place, tmp_path / "a", device="gpu"), console=QUIET)
    assert not (tmp_path / "a").exists()


# Faults of the past, put back


def unmoved(self: FlatRunner, flat: Any, *more: torch.Tensor) -> Any:
    """A batch that stays on the CPU."""
    from veneer.models.layout import Layout, PreparedBatch

    return PreparedBatch(flat.ids, flat.positions, flat.offsets, Layout.flat(flat)), list(more)


def device_layout(batch: Any) -> Any:
    """A layout on the device, which the route then reads with a tensor of the CPU."""
    from veneer.models.layout import Layout

    index = torch.arange(batch.ids.numel(), device="cuda:0")
    return Layout((1, len(index)), index, index)


def mixed_losses(self: step.PassLosses, losses_U: torch.Tensor) -> None:
    """Losses of the device times weights of the CPU."""
    self._weighted_U = losses_U.double() * self._weights_U


def unread(passes: Any, *more: torch.Tensor) -> list[torch.Tensor]:
    """Losses that are taken as they are."""
    for one in passes:
        one.take(one.losses_U)
    return list(more)


def magnitude_read_back(part: Any, dots_O: torch.Tensor | None = None) -> torch.Tensor:
    """The gradient of a magnitude, looked at once a layer."""
    found = branch.column_dots(part.g_nO, part.y_nO, part.layer[1]).to(part.s_O.dtype) / part.factors.magnitude.detach()
    assert float(found.sum()) < 1e30
    return found


def places_of_the_device(count: int, drawn: dropout.Dropout, device: Any = "cpu") -> torch.Tensor:
    """Dropout by other random numbers on a device than on the CPU."""
    return dropout.places(count, drawn._replace(seed=drawn.seed + (torch.device(device).type != "cpu")), device)


MIXED = "takes tensors on cpu and cuda:0"
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "the batch is never moved": ({"veneer.models.flat.FlatRunner.send": unmoved}, "lora", MIXED),
    "a tensor of the CPU is indexed by one of the device": (
        {"veneer.models.flat.Layout.flat": staticmethod(device_layout)},
        "four jobs",
        MIXED,
    ),
    "losses and weights of two devices meet": (
        {"veneer.training.loop.step.PassLosses.take": mixed_losses, "veneer.training.loop.step.fetch_losses": unread},
        "lora",
        MIXED,
    ),
    "a magnitude is read back in every layer": (
        {"veneer.kernels.lora.single.magnitude_gradient": magnitude_read_back},
        "dora",
        "too many reads",
    ),
    "a device drops other elements": ({"veneer.kernels.lora.branch.places": places_of_the_device}, "dropout", "assert"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_device_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faults that this code had, or might have, make the test above fail, for the right reason."""
    changes, case, words = FAULTS[fault]
    expected = trained(None, CASES[case])
    for place, broken in changes.items():
        monkeypatch.setattr(place, broken)
    with pytest.raises((DeviceMixError, AssertionError), match=words):
        check_on_device(case, expected)


def test_the_loss_takes_large_chunks_on_a_gpu() -> None:
    """48 MiB of logits at a time are for a CPU's cache; a GPU takes a gigabyte, or a small one its share."""
    vocabulary = 151_936
    assert cross_entropy._chunk(8192, vocabulary, 2, torch.device("cpu")) == 164
    cross_entropy.device_bytes.cache_clear()
    with PretendDevice():
        assert cross_entropy._chunk(8192, vocabulary, 2, torch.device("cuda:0")) == 2048
    cross_entropy.device_bytes.cache_clear()


def test_a_mask_is_made_where_the_input_is() -> None:
    """A GPU computes its own mask, the same as a CPU's, and waits for nothing."""
    drawn = dropout.Dropout(0.3, 7)
    indices = dropout.places(1000, drawn)
    with PretendDevice() as device:
        found = dropout.places(1000, drawn, "cuda:0")
        assert device.of(found) == device.device and not device.moves and not device.reads
    assert found.dtype == torch.bool and found.nonzero().squeeze(1).tolist() == indices.tolist()
