"""A tiny base in a folder, files of examples, jobs in memory, and a run's result as hashes: what the tests of training are made of."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.checkpoints.helpers import newest
from tests.tiny import tiny, tiny_tokenizer

from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.config import TrainOptions
from veneer.data.example import Example
from veneer.models.flat import FlatRunner
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import Listener, Request, Trainer
from veneer.training.run.console import Console

QUIET = Console(quiet=True)
SIZES = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
Method = LoRA | DoRA


def write_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """A file of ``count`` sums as messages."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            a, b = rng.randrange(90), rng.randrange(90)
            turns = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_place(place: Path) -> Path:
    """A folder with a tiny base in ``base``, and ``train.jsonl`` and ``valid.jsonl``."""
    model = tiny("llama", num_key_value_heads=1, **SIZES)
    model.save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    write_rows(place / "train.jsonl", 37)
    write_rows(place / "valid.jsonl", 5, seed=1)
    return place


def options(place: Path, out: Path, **others: Any) -> dict[str, Any]:
    """Options of a short run on the tiny base: dropout on, a checkpoint every five steps."""
    return {
        "data": (place / "train.jsonl",),
        "base": str(place / "base"),
        "dtype": "float32",
        "out": out,
        "r": 2,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "batch_size": 2,
        "steps": 12,
        "save_every": 5,
        "eval_every": 1000,
        "plan": False,
        **others,
    }


def four_jobs() -> list[dict[str, Any]]:
    """LoRA and DoRA, own learning rates, two with dropout, different lengths."""
    return [
        {"name": "a", "r": 2, "lora_dropout": 0.2, "seed": 1},
        {"name": "b", "method": "dora", "r": 3, "lora_dropout": 0.0, "learning_rate": 5e-3, "steps": 7},
        {
            "name": "c",
            "method": "dora",
            "r": 1,
            "lora_dropout": 0.1,
            "learning_rate": 2e-2,
            "steps": 9,
            "batch_size": 3,
        },
        {"name": "d", "r": 4, "lora_dropout": 0.0, "learning_rate": 1e-3, "schedule": "cosine", "seed": 9},
    ]


def figures(path: Path) -> list[dict[str, Any]]:
    """A file of figures without times of day, speeds and memory."""
    apart = ("time", "tokens_per_second", "memory_gb")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in apart} for line in lines]


def digest(out: Path) -> dict[str, str]:
    """SHA-256 of all that a run leaves behind: adapters, the last state, figures."""
    found = {}
    for path in sorted(out.rglob("adapter_*")):
        found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    last = newest(out / "checkpoints")
    assert last is not None
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    state.pop("lengths")  # speeds and times of day have no fixed width
    found["state"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    tensors = load_file(last / "tensors.safetensors")
    found["tensors"] = hashlib.sha256(
        b"".join(key.encode() + tensors[key].numpy().tobytes() for key in sorted(tensors))
    ).hexdigest()
    for path in sorted((out / "metrics").iterdir()):
        found[f"metrics/{path.name}"] = hashlib.sha256(json.dumps(figures(path)).encode()).hexdigest()
    return found


def contents(out: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder but the lock, which names the process."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def examples(count: int, *, seed: int = 0, shortest: int = 4, longest: int = 12) -> list[Example]:
    """Random examples; the second half of each is learnt."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        ids = tuple(rng.randrange(3, 320) for _ in range(rng.randint(shortest, longest)))
        half = len(ids) // 2
        found.append(Example(ids, (0.0,) * half + (1.0,) * (len(ids) - half), f"rows:{i}"))
    return found


def model_of_world(arch: str = "llama", *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """The tiny model of a `World`."""
    sizes = {**SIZES, "num_key_value_heads": 1} if arch == "llama" else {}
    return tiny(arch, dtype=dtype, **{**sizes, **overrides})


class World:
    """A tiny model with a bank, and what it takes to run jobs on it."""

    def __init__(
        self, arch: str = "llama", *, dtype: torch.dtype = torch.float32, model: Any = None, **overrides: Any
    ) -> None:
        self.model = model_of_world(arch, dtype=dtype, **overrides) if model is None else model
        self.bank: Bank = attach(self.model)
        self.runner = FlatRunner(self.model)
        self.stepper = Stepper(self.runner, self.bank)

    def job(
        self,
        name: str,
        method: Method | None = None,
        *,
        rows: Sequence[Example] | None = None,
        seed: int = 0,
        **others: Any,
    ) -> Job:
        """A job whose adapter is in the bank, with a B that is not zero, so that every gradient is there from the start."""
        self.bank.add(name, method or LoRA(r=2), seed=seed)
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for _, key, parameter in self.bank[name].named_tensors():
                if key == "lora_B":
                    parameter.normal_(0, 0.05, generator=generator)
        held_out = others.pop("held_out", [])
        plain = {"learning_rate": 1e-2, "warmup_steps": 0, "batch_size": 2, "steps": 6, "seed": seed}
        plain |= {"schedule": "constant", **others}
        chosen = TrainOptions(data=("rows.jsonl",), valid=("held.jsonl",), **plain)
        rows = examples(9, seed=seed) if rows is None else rows
        return Job(name, chosen, self.bank, rows, held_out, peak=chosen.learning_rate or 0.0, steps=chosen.steps or 1)

    def trainer(self, jobs: Sequence[Job], listener: Any = None, *, budget: int = 64, share: int = 512) -> Trainer:
        """A trainer that tells nobody, unless a listener is given."""
        return Trainer(self.stepper, jobs, listener or Ear(), tokens_per_pass=budget, tokens_per_shared_pass=share)


class Ear(Listener):
    """A listener that remembers losses, and asks for what it is told to ask."""

    def __init__(self, asks: dict[int, Iterable[Request]] | None = None) -> None:
        self.joining: list[Job] = []
        self.losses: dict[str, list[float]] = {}
        self.ends: dict[str, str] = {}
        self.rounds = 0
        self._asks = asks or {}

    def stepped(self, job: Job, metrics: dict[str, float]) -> None:
        """Remember the loss."""
        self.losses.setdefault(job.name, []).append(metrics["loss"])

    def ended(self, job: Job) -> None:
        """Remember how."""
        self.ends[job.name] = job.code or job.state.value

    def requests(self) -> Iterable[Request]:
        """What is to be asked for at this round."""
        return self._asks.get(self.rounds, ())

    def new_jobs(self) -> Iterable[Job]:
        """Jobs that were handed over since the last call."""
        found, self.joining = self.joining, []
        return found

    def end_round(self) -> bool:
        """Go on."""
        self.rounds += 1
        return True


def values(world: World, name: str) -> list[torch.Tensor]:
    """Copies of a job's tensors."""
    return [parameter.detach().clone() for parameter in world.bank[name].parameters()]


def apart(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Largest relative distance (L2) of two lists of tensors."""
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
        for a, b in zip(one, other, strict=True)
    )
