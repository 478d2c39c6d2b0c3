"""A base that processes hold in parts: the bits of a run with whole ones, less memory, and what cannot be had of it."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor  # imported here, so that forks need not
from tests.tiny import tiny
from tests.training.killing import litter
from tests.training.made import QUIET, Ear, World, digest, examples, four_jobs, options
from tests.training.processes import Forks, together

from veneer.adapters import DoRA, LoRA
from veneer.config import TrainOptions
from veneer.errors import ConfigError, ProcessError
from veneer.models.load import load_base
from veneer.training import train
from veneer.training.activation_checkpointing import activation_checkpointing
from veneer.training.device_memory import DeviceMemory
from veneer.training.loop.job import Job
from veneer.training.parallel.processes import ALONE, Processes
from veneer.training.parallel.sharding import check_shard, shard_base
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


def divide(world: World, jobs: list[Job], processes: Processes) -> None:
    """Divide the base of a world."""
    setup: Any = SimpleNamespace(
        options=SimpleNamespace(shard="full"),
        base=SimpleNamespace(model=world.model),
        bank=world.bank,
        jobs=jobs,
        stepper=world.stepper,
        device=torch.device("cpu"),
    )
    shard_base(setup, processes, lambda line: None)


def trained(case: str, processes: Processes, *, whole: bool, recompute: bool = False) -> list[Any]:
    """Train jobs of ragged rows: a hash of the tensors, the losses and the evaluations."""
    arch, sizes, methods = CASES[case]
    world, ear, held = World(arch, **sizes), Ear(), examples(5, seed=50)
    jobs = [
        world.job(
            f"job{i}", method, seed=i, rows=examples(13, seed=i, longest=40), held_out=held, eval_every=3, steps=4
        )
        for i, method in enumerate(methods)
    ]
    if not whole:
        divide(world, jobs, processes)
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


def mapped(folder: Path) -> list[range]:
    """Addresses of the files of a folder that this process has mapped into its memory."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    return [range(*(int(number, 16) for number in line.split()[0].split("-"))) for line in lines]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the mappings of a process from /proc")
def test_no_process_holds_the_whole_base(tmp_path: Path) -> None:
    """A run is set up on weights in their file, which the processes of a machine share; then each process has its part, and no file."""
    tiny("llama", num_hidden_layers=8, hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)

    def work(processes: Processes) -> tuple[float, float, int]:
        before = storages()

        def own() -> int:
            files = mapped(tmp_path)
            new = {at: size for at, size in storages().items() if at not in before}
            return sum(size for at, size in new.items() if not any(at in file for file in files))

        world = World(model=load_base(tmp_path, dtype="float32").model)
        weights = sum(p.nbytes for p in world.model.parameters())
        job = world.job("a", DoRA(r=1), rows=examples(2, longest=5), batch_size=2)
        gc.collect()
        whole = own()
        divide(world, [job], processes)
        trainer = world.trainer([job])
        trainer.processes = processes
        trainer.round()
        gc.collect()
        return whole / weights, own() / weights, len(mapped(tmp_path))

    for whole, divided, files in together(2, work):
        assert whole < 0.1 and divided <= 0.6 and files == 0


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
        world = World(num_hidden_layers=40, hidden_size=160, intermediate_size=384, num_attention_heads=4)
        job = world.job("a", LoRA(r=1, target_modules=("q_proj",)), rows=examples(2, longest=5), steps=9)
        weights = sum(p.nbytes for p in world.model.parameters())
        gc.collect()
        whole = held()
        activations = most_held(world, job, ALONE) - whole
        divide(world, [job], processes)
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
        world = World()
        divide(world, [world.job("a")], processes)
        with pytest.raises(ProcessError, match="read outside of a pass; use --shard none") as raised:
            _ = next(iter(world.bank.sites.values())).weight_2d
        return str(raised.value)

    assert len(together(2, work)) == 2
    assert shard_base(None, ALONE, print) is None  # type: ignore[arg-type]
