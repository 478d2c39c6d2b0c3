"""Makes the tables of docs/scaling_costs.md: one job on up to 1,000 GPUs, and 256 jobs on a cluster of as many.

    python -m docs.scripts.scaling              computes, and writes the tables into the page

Nothing is measured: a clock that jumps from event to event stands in for the GPUs, with the rates of `RATES`. The package's own code
decides: about memory ``training/planning/fitting.py``, about a step's pieces ``cut`` and ``deal``, about the parts of a run and their way
to workers ``ClusterRun``, with workers that are lost.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from veneer.adapters import LoRA
from veneer.config import TrainOptions
from veneer.data.batch import packed
from veneer.training.cluster import driver
from veneer.training.cluster.driver import ClusterRun
from veneer.training.cluster.ray_workers import Slot
from veneer.training.cluster.worker import Loaded, Outcome, versions
from veneer.training.parallel.processes import deal
from veneer.training.planning.fitting import Shape, memory_of, shape_of
from veneer.training.run.console import Console
from veneer.training.run.jobs import expand
from veneer.training.run.result import JobResult, RunResult

PAGE = Path(__file__).resolve().parents[1] / "scaling_costs.md"
START, END = "<!-- tables -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Rates:
    """The assumptions. product: useful FLOP/s of a GPU. inside, between: bytes/s of an all-reduce for each GPU of a machine, and between
    machines. hop: seconds of a message. reading: bytes/s at which a worker reads the base. price: of a GPU and hour. lost_every: GPU-hours
    between two lost workers. checkpoint: seconds between checkpoints. noticing: seconds until a loss is seen."""

    product: float = 400e12
    memory: float = 80e9
    per_machine: int = 8
    inside: float = 300e9
    between: float = 50e9
    hop: float = 20e-6
    reading: float = 2e9
    price: float = 3.0
    lost_every: float = 50.0
    checkpoint: float = 600.0
    noticing: float = 30.0


RATES = Rates()
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-1.7B": (
        "Qwen3ForCausalLM",
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
        }
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "Llama-3-8B": (
        "LlamaForCausalLM",
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
        }
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    ),
}
RANK, TOKENS = 16, 8192
GPUS = (1, 8, 64, 256, 1000)


@dataclass(frozen=True)
class BaseModel:
    """A base: its shape, and the numbers of an adapter of rank 16."""

    name: str
    shape: Shape

    @property
    def trained(self) -> int:
        """Numbers of an adapter."""
        method = LoRA()
        return sum(math.prod(size) for g in self.shape.sites for size in method.shapes_of_rank(g, RANK).values())

    def seconds(self, tokens: float) -> float:
        """Time of a training pass over so many tokens."""
        return tokens * (4 * self.shape.linear + 6 * self.trained) / RATES.product

    @property
    def bytes(self) -> int:
        """Bytes of the weights in bf16."""
        return 2 * (self.shape.linear + self.shape.other)


def bases() -> list[BaseModel]:
    """The bases, from a config.json each."""
    found = []
    for name, (architecture, config) in BASES.items():
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "config.json").write_text(
                json.dumps({**config, "architectures": [architecture]}), encoding="utf-8"
            )
            found.append(BaseModel(name, shape_of(Path(place), "lora")))
    return found


# One job on many GPUs


def lengths(count: int) -> list[range]:
    """Examples of log-uniform lengths from 128 to 2,048 tokens."""
    draw = random.Random(0)
    return [range(round(128 * 16 ** draw.random())) for _ in range(count)]


def all_reduce(bytes_: float, gpus: int) -> float:
    """Time of a sum over all GPUs: inside each machine, then between machines."""
    machines = math.ceil(gpus / RATES.per_machine)
    inside = min(gpus, RATES.per_machine)
    seconds = 2 * (inside - 1) / inside * bytes_ / RATES.inside + 2 * (inside - 1) * RATES.hop
    if machines > 1:
        seconds += 2 * (machines - 1) / machines * bytes_ / RATES.between + 2 * math.log2(machines) * RATES.hop
    return seconds


def one_job(base: BaseModel, examples: int) -> list[list[str]]:
    """A row for each number of GPUs: a step of so many examples."""
    rows = []
    pieces = [sum(map(len, group)) for group in packed(lengths(examples), TOKENS)]
    alone = base.seconds(sum(pieces))
    for gpus in GPUS:
        if gpus > len(pieces):
            rows.append([base.name, f"{gpus:,}", "", "", "", f"a step has {len(pieces)} pieces"])
            continue
        load = [0] * gpus
        for piece, owner in zip(pieces, deal(pieces, gpus), strict=True):
            load[owner] += piece
        joined = all_reduce(4 * base.trained, gpus) if gpus > 1 else 0.0
        took = base.seconds(max(load)) + joined
        cost = took * gpus / 3600 * RATES.price / sum(pieces) * 1e9
        rows.append(
            [
                base.name,
                f"{gpus:,}",
                f"{took:.2f} s",
                f"{1e3 * joined:.1f} ms",
                f"{alone / took / gpus:.0%}",
                f"{cost:,.0f}",
            ]
        )
    return rows


# Many jobs on a cluster


class Call:
    """A call of a worker: its answer, and the time of the clock at which it is there."""

    def __init__(self, answer: Any, at: float = 0.0) -> None:
        self.answer = answer
        self.at = at


class Lost(Exception):
    """A worker is gone."""


class Remote:
    """A method of a simulated worker."""

    def __init__(self, method: Callable[..., Call]) -> None:
        self.remote = method


class SimulatedWorker:
    """A worker that takes the time of its jobs' tokens, and may be lost."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._lost_at = cluster.now + cluster.draw.expovariate(1 / (RATES.lost_every * 3600))
        self._ready = cluster.now + cluster.base.bytes / RATES.reading
        self.versions = Remote(lambda: Call(("node", versions())))
        self.sees = Remote(lambda *args: Call(True))
        self.load = Remote(lambda options, jobs: Call(Loaded("base", cluster.fits)))
        self.progress = Remote(lambda: Call({}))
        self.train = Remote(self._train)

    def _train(self, part: Any, whole: str) -> Call:
        cluster = self._cluster
        begun = max(cluster.now, self._ready)
        left = cluster.left.setdefault(part.number, sum(cluster.seconds[name] for name in part.jobs))
        if begun + left <= self._lost_at:
            results = {name: _finished(name, part.folder) for name in part.jobs}
            return Call(Outcome(RunResult(part.folder, results)), begun + left)
        done = max(0.0, self._lost_at - begun)
        kept = done - done % RATES.checkpoint
        if kept:
            (part.folder / "checkpoints" / f"step-{int(begun + kept):08d}").mkdir(parents=True)
        cluster.left[part.number] = left - kept
        cluster.again += done - kept
        cluster.losses += 1
        return Call(Lost("gone"), max(self._lost_at, cluster.now) + RATES.noticing)


class SimulatedCluster:
    """Workers, and a clock that jumps from one event to the next."""

    def __init__(self, base: BaseModel, gpus: int, fits: int, seconds: dict[str, float]) -> None:
        self.base, self.gpus, self.fits, self.seconds = base, gpus, fits, seconds
        self.draw = random.Random(gpus)
        self.now, self.again, self.losses = 0.0, 0.0, 0
        self.left: dict[int, float] = {}

    def slots(self) -> list[Slot]:
        """A place for each GPU."""
        return [Slot(f"n{g // 8}", f"n{g // 8:03d}", g % 8, 1.0, 1) for g in range(self.gpus)]

    def start(self, slot: Slot, train_part: Any) -> SimulatedWorker:
        """A new worker."""
        return SimulatedWorker(self)

    def wait(self, calls: Sequence[Call], seconds: float) -> list[Call]:
        """The calls that end next."""
        self.now = max(self.now, min(call.at for call in calls))
        return [call for call in calls if call.at <= self.now]

    def answers(self, calls: Sequence[Call], seconds: float) -> list[Any]:
        """At once."""
        return [call.answer for call in calls]

    def answer(self, call: Call, seconds: float) -> Any:
        """At once."""
        return call.answer

    def lost(self, answer: Any) -> bool:
        """True for the answer of a worker that is gone."""
        return isinstance(answer, Lost)

    def end(self, worker: SimulatedWorker) -> None:
        """Nothing is left of it."""


def _finished(name: str, out: Path) -> JobResult:
    return JobResult(name, "lora", RANK, 1e-4, "finished", "", 1, (), out, out, {})


def many_jobs(base: BaseModel, jobs: int, steps: int) -> list[list[str]]:
    """A row for each number of GPUs: a sweep of so many jobs, of 16 examples a step."""
    alone = memory_of(base.shape, "bfloat16", LoRA, RANK, TOKENS, checkpointing=False)
    fits = 1 + int((RATES.memory - alone) // (16 * base.trained))
    mean = sum(map(len, lengths(1000))) / 1000
    rows = []
    for gpus in GPUS:
        with tempfile.TemporaryDirectory() as place:
            data, out = Path(place) / "rows.jsonl", Path(place) / "run"
            out.mkdir()
            data.write_text("{}\n", encoding="utf-8")
            named = [{"name": f"job{n}"} for n in range(jobs)]
            options = TrainOptions(data=(data,), out=out, jobs=named, steps=steps, cluster="auto")
            draw = random.Random(1)
            seconds = {job["name"]: base.seconds(16 * mean * steps) * draw.uniform(0.5, 1.5) for job in named}
            cluster = SimulatedCluster(base, gpus, fits, seconds)
            run = ClusterRun(
                options,
                expand(options),
                out,
                cast("Any", cluster),
                cast("Any", None),
                Console(quiet=True),
            )
            run.begin(fresh=False)
            run.finish()
        hours, ideal = cluster.now / 3600, sum(seconds.values()) / gpus / 3600
        cost = f"{hours * gpus * RATES.price:,.0f}"
        share = f"{cluster.again / sum(seconds.values()):.1%}"
        rows.append(
            [
                base.name,
                f"{gpus:,}",
                str(fits),
                f"{hours:,.2f} h",
                f"{ideal / hours:.0%}",
                f"{cluster.losses}",
                share,
                cost,
            ]
        )
    return rows


# The page


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> str:
    """Both tables."""
    driver._LOOK_SECONDS = 0.0
    found = bases()
    single = [row for base in found for row in one_job(base, 16_384)]
    several = [row for base in found for row in many_jobs(base, 256, 2000)]
    return "\n\n".join(
        [
            "## One job: a step of 16,384 examples",
            table(["base", "GPUs", "step", "sum of gradients", "efficiency", "$ per billion tokens"], single),
            "## 256 jobs of 2,000 steps on a Ray cluster",
            table(
                ["base", "GPUs", "jobs that fit on one", "time", "efficiency", "workers lost", "work done again", "$"],
                several,
            ),
        ]
    )


def main() -> None:
    """Write the tables into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
