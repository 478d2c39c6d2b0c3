"""A base that processes hold in parts: the bits of a run with whole ones, less memory, and what cannot be had of it."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor  # imported here, so that forks need not
from tests.tiny import tiny
from tests.training.killing import litter
from tests.training.made import QUIET, Ear, World, digest, examples, four_jobs, model_of_world, options
from tests.training.processes import Forks, together

from veneer.adapters import DoRA, LoRA
from veneer.config import TrainOptions
from veneer.errors import ConfigError, ProcessError
from veneer.models.divided.embedding_output import EmbeddingOutput
from veneer.models.divided.sharding import Shards
from veneer.models.load import load_base
from veneer.training import train
from veneer.training.activation_checkpointing import activation_checkpointing, layers_of
from veneer.training.device_memory import DeviceMemory
from veneer.training.loop.job import Job
from veneer.training.parallel.processes import ALONE, Processes
from veneer.training.parallel.sharding import check_shard, keep_numbers, shards_of_run
from veneer.training.process_memory import give_back, return_large_blocks
from veneer.training.run.console import Console

LOWEST, HIGHEST = LoRA(r=2, layers_to_transform=(0,)), LoRA(r=2, layers_to_transform=(2,))
CASES: dict[str, tuple[str, dict[str, Any], list[LoRA | DoRA]]] = {
    "other layers": ("llama", {"num_hidden_layers": 3}, [HIGHEST, DoRA(r=2, lora_dropout=0.2), LOWEST]),
    "experts": ("qwen3_moe", {}, [LoRA(r=2), DoRA(r=2)]),
    "conv1d": ("gpt2", {}, [LoRA(r=2), DoRA(r=3, lora_dropout=0.1)]),
    "head": (
        "llama",
        {},
        [
            LoRA(r=2, target_modules=("embed_tokens", "lm_head", "q_proj")),
            DoRA(r=2, modules_to_save=("lm_head",)),
        ],
    ),
    "tied": ("llama", {"tie_word_embeddings": True}, [LoRA(r=2, target_modules=("embed_tokens", "q_proj"))]),
}


def shards_of(processes: Processes) -> tuple[Shards, Any]:
    """What divides a base, and the call that does."""
    shards = Shards(processes.share, first=processes.first)
    processes.lockstep = True
    return shards, partial(shards.divide, layers_of, torch.device("cpu"))


def world_in_parts(
    processes: Processes, make: Callable[[World], list[Job]], arch: str = "llama", **sizes: Any
) -> tuple[World, list[Job]]:
    """A world on a divided base, and its jobs."""
    shards, divide = shards_of(processes)
    model = model_of_world(arch, **sizes)
    divide(model)
    return in_step(shards, model, make)


def in_step(shards: Shards, model: Any, make: Callable[[World], list[Job]]) -> tuple[World, list[Job]]:
    """A world on a model that is divided, and its jobs."""
    with shards.in_step():
        world = World(model=model)
        shards.free()
        for site in world.bank.survey.every():
            site.lender = shards.whole
        jobs = make(world)
    setup: Any = SimpleNamespace(bank=world.bank, jobs=jobs)
    keep_numbers(setup, shards)
    world.stepper.shards, world.stepper.bottom = shards, EmbeddingOutput(model)
    return world, jobs


def trained(case: str, processes: Processes, *, whole: bool, recompute: bool = False) -> list[Any]:
    """Train jobs of ragged rows: a hash of the tensors, the losses and the evaluations."""
    arch, sizes, methods = CASES[case]
    ear, held = Ear(), examples(5, seed=50)

    def make(world: World) -> list[Job]:
        return [
            world.job(
                f"job{i}", method, seed=i, rows=examples(13, seed=i, longest=40), held_out=held, eval_every=3, steps=4
            )
            for i, method in enumerate(methods)
        ]

    if whole:
        world = World(arch, **sizes)
        jobs = make(world)
    else:
        world, jobs = world_in_parts(processes, make, arch, **sizes)
    trainer = world.trainer(jobs, ear, budget=50, share=70)
    trainer.processes = processes
    with activation_checkpointing(world.model, recompute):
        trainer.run()
    tensors = b"".join(p.detach().numpy().tobytes() for job in jobs for p in job.parameters)
    return [hashlib.sha256(tensors).hexdigest(), ear.losses, [job.progress.evaluations for job in jobs], ear.ends]


@pytest.mark.parametrize(
    ("size", "case", "recompute"),
    [
        (2, "other layers", True),
        pytest.param(4, "other layers", False, marks=pytest.mark.slow),
        pytest.param(2, "experts", False, marks=pytest.mark.slow),
        pytest.param(2, "conv1d", False, marks=pytest.mark.slow),
        pytest.param(2, "head", False, marks=pytest.mark.slow),
        pytest.param(2, "tied", False, marks=pytest.mark.slow),
    ],
)
def test_parts_train_as_whole_bases(size: int, case: str, recompute: bool) -> None:
    """Jobs on different layers, experts, heads: every number has the bits that it has with a whole base in each process."""
    whole = together(size, lambda processes: trained(case, processes, whole=True))
    parts = together(size, lambda processes: trained(case, processes, whole=False, recompute=recompute))
    assert parts == whole and all(one == parts[0] for one in parts)
    assert set(parts[0][3].values()) == {"finished"}


def storages() -> dict[int, int]:
    """{address: bytes} of all tensors in this process."""
    from torch.distributed.tensor import DTensor

    # By type: isinstance would ask deprecated objects of torch for their class, which warns.
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not issubclass(type(t), DTensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def held() -> int:
    """Bytes of all tensors in this process."""
    return sum(storages().values())


def test_weights_are_read_in_parts(tmp_path: Path) -> None:
    """Each process reads its rows of the files, converted and stacked on the way; what cannot be read in parts is divided later."""
    for arch in ("llama", "qwen3_moe", "gpt2"):
        tiny(arch).save_pretrained(tmp_path / arch)
    cases = [("llama", None, True), ("llama", "int8", False), ("qwen3_moe", None, True), ("gpt2", None, True)]

    def work(processes: Processes) -> list[bool]:
        found = []
        for arch, quantize, by_parts in cases:
            shards, divide = shards_of(processes)
            empty: list[bool] = []

            def cut(model: Any, divide: Any = divide, empty: list[bool] = empty) -> None:
                empty.append(next(model.parameters()).is_meta)
                divide(model)

            base = load_base(tmp_path / arch, dtype="bfloat16", quantize=quantize, divide=cut)
            whole = load_base(tmp_path / arch, dtype="bfloat16", quantize=quantize)
            assert repr(base) == repr(whole) and empty == [by_parts]
            with shards.in_step(), shards.whole(base.model):
                pairs = zip(base.model.named_parameters(), whole.model.named_parameters(), strict=True)
                found.append(
                    all(a[0] == b[0] and a[1].dtype == b[1].dtype and torch.equal(*(a[1], b[1])) for a, b in pairs)
                )
        return found

    assert together(2, work) == [[True] * len(cases)] * 2


@contextmanager
def most_private() -> Iterator[list[int]]:
    """The most private memory of this process inside the context, beyond what it had."""

    def now() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    give_back()  # a fork begins with the freed memory of its parent, and would use that first
    before, most, over = now(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            most[0] = max(most[0], now() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_no_process_ever_holds_the_whole_base(tmp_path: Path) -> None:
    """From loading to the first step, with weights that are converted while they are read, two processes have at most 0.8 of the private
    memory of one."""
    layers = {"small": 2, "large": 24}
    for name, count in layers.items():
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 4}
        tiny("llama", num_hidden_layers=count, **sizes).save_pretrained(tmp_path / name)

    def make(world: World) -> list[Job]:
        return [world.job("a", DoRA(r=1, target_modules=("q_proj",)), rows=examples(2, longest=5), batch_size=2)]

    def work(processes: Processes) -> int:
        for name in layers:  # the first is for what is imported and made once
            with most_private() as most:
                load = partial(load_base, tmp_path / name, dtype="bfloat16")
                if processes.alone:
                    world = World(model=load().model)
                    jobs = make(world)
                else:
                    return_large_blocks()
                    shards, divide = shards_of(processes)
                    world, jobs = in_step(shards, load(divide=divide).model, make)
                trainer = world.trainer(jobs)
                trainer.processes = processes
                trainer.round()
            del world, jobs, trainer
            gc.collect()
        return most[0]

    (one,), several = together(1, work), together(2, work)
    assert one > 100e6 and max(several) <= 0.8 * one, (several, one)


def most_held(world: World, job: Job, processes: Processes) -> int:
    """The most that is held at the first, middle and last layer of a round, forward and backward."""
    found: list[int] = []
    layers = world.model.model.layers

    def sample(_module: Any, _args: Any, output: torch.Tensor) -> None:
        found.append(held())
        if output.requires_grad:
            output.register_hook(lambda grad: found.append(held()))

    hooks = [layers[at].mlp.register_forward_hook(sample) for at in (0, len(layers) // 2, -1)]
    trainer = world.trainer([job])
    trainer.processes = processes
    trainer.round()
    for hook in hooks:
        hook.remove()
    return max(found)


@pytest.mark.slow
def test_parts_take_less_memory() -> None:
    """With two processes each holds at most 0.6 of what one holds, between passes and, besides activations, in them."""

    def work(processes: Processes) -> list[float]:
        sizes = {"num_hidden_layers": 40, "hidden_size": 160, "intermediate_size": 384, "num_attention_heads": 4}

        def make(world: World) -> list[Job]:
            return [world.job("a", LoRA(r=1, target_modules=("q_proj",)), rows=examples(2, longest=5), steps=9)]

        world = World(**sizes)
        (job,) = make(world)
        weights = sum(p.nbytes for p in world.model.parameters())
        gc.collect()
        whole = held()
        activations = most_held(world, job, ALONE) - whole
        del world, job
        gc.collect()
        world, (job,) = world_in_parts(processes, make, **sizes)
        divided = most_held(world, job, processes)
        gc.collect()
        return [whole / weights, held() / whole, (divided - activations) / whole]

    found = together(2, work)
    assert all(one[0] < 1.2 and one[1] <= 0.6 and one[2] <= 0.6 for one in found), found


def run_together(size: int, wanted: dict[str, Any]) -> Forks:
    """Start a run in so many processes, each of which loads its base."""

    def work(rank: int) -> list[str]:
        said: list[str] = []
        shown = Console(quiet=True)
        shown.line = said.append  # type: ignore[method-assign]
        train(wanted, console=shown)
        return said

    return Forks(size, work)


@pytest.fixture
def wanted(place: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of two DoRA jobs whose steps have several pieces."""
    jobs = [{**job, "steps": 4 + number} for number, job in enumerate(four_jobs()[1:3])]
    more = {"tokens_per_pass": 60, "valid": (place / "valid.jsonl",), "eval_every": 2, "save_every": 2}
    return {**options(place, tmp_path / "full", jobs=jobs, batch_size=4), **more, "device": "cpu"}


@pytest.mark.parametrize("quantize", [None, pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_run_in_parts(wanted: dict[str, Any], tmp_path: Path, quantize: str | None) -> None:
    """Adapters with their receipts, checkpoints and figures of a run whose base is divided are those of one whose bases are whole."""
    wanted["quantize"] = quantize
    forks = run_together(2, {**wanted, "shard": "full"})
    assert forks.wait(90) == [0, 0], forks.errors()
    assert "the base is divided among 2 processes" in forks.results()[0]
    assert run_together(2, {**wanted, "out": tmp_path / "none"}).wait(90) == [0, 0]
    assert digest(tmp_path / "full") == digest(tmp_path / "none") and not litter(tmp_path / "full")


@pytest.mark.slow
def test_auto_divides_a_base_that_is_too_large(
    wanted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "auto" the base stays whole where there is room, and is divided where less than its size is left in any process."""
    free = {"0": 1 << 40, "1": 1 << 40}
    monkeypatch.setattr(DeviceMemory, "free", lambda self: free[__import__("os").environ["RANK"]])
    assert not any("divided" in line for line in run_and_say(wanted))
    free["1"] = 1000
    assert any("divided" in line for line in run_and_say({**wanted, "out": tmp_path / "small"}))
    sampled = {**wanted, "out": tmp_path / "sampled", "sample_prompts": ("1+1",)}
    assert not any("divided" in line for line in run_and_say(sampled))


def run_and_say(wanted: dict[str, Any]) -> list[str]:
    """The lines of a run in two processes."""
    forks = run_together(2, wanted)
    assert forks.wait(90) == [0, 0], forks.errors()
    lines: list[str] = forks.results()[0]
    return lines


def test_what_cannot_be_divided(wanted: dict[str, Any]) -> None:
    """One process, a base in memory, samples and DPO are refused before anything starts; weights are not read behind the others' backs."""
    wanted["shard"] = "full"
    with pytest.raises(ConfigError, match="shard: full divides the base among processes, and only one runs"):
        train(wanted, console=QUIET)
    assert not wanted["out"].exists()
    for more, loads, said in (
        ({"samples": 1}, True, "cannot generate samples; leave samples"),
        ({"task": "dpo"}, True, "trains the task sft, and not dpo"),
        ({}, False, "give its name, and not a base in memory"),
    ):
        asked = TrainOptions(data=("rows.jsonl",), shard="full", **more)
        with pytest.raises(ConfigError, match=said):
            check_shard(asked, [asked], Processes(0, 2), loads=loads)

    def work(processes: Processes) -> str:
        world, _ = world_in_parts(processes, lambda world: [world.job("a")])
        with pytest.raises(ProcessError, match="read outside of a pass; use --shard none") as raised:
            _ = next(iter(world.bank.sites.values())).weight_2d
        return str(raised.value)

    assert len(together(2, work)) == 2
    assert shards_of_run(TrainOptions(data=("rows.jsonl",)), {}, ALONE, loads=True) is None
