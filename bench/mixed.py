"""Cost of many adapters on one base: mixed batches, jobs trained together, memory, a thousand adapters.

    python -m bench.mixed [forward] [peft] [jobs] [memory] [bank] [--rounds 15] [--json FILE]

    forward    16 rows on 16 adapters against one adapter, with 1 and 64 tokens per row, on the embedded model in its fast dtype
    peft       the same batch through PEFT's adapter_names, on a model of many small layers; outputs are compared first
    jobs       four jobs of 32 tokens per step in shared passes against the same four in turn
    memory     peak memory of eight jobs against one job with passes as large, plus the adapters' own bytes
    bank       adding the 1,000th adapter against adding the first, and loading and removing it

Both sides of a ratio are timed in turn, round by round, since the machine drifts. Prints the median, minimum and maximum ratio. Without
names all five parts run.
"""

from __future__ import annotations

import veneer  # noqa: F401  # isort: skip  (before torch, as in a command: it limits how long OpenMP's threads spin)

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.tiny import tiny

from veneer.adapters import DoRA, LoRA
from veneer.checkpoints import attach
from veneer.config import TrainOptions
from veneer.data.example import Example
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base
from veneer.training.cpp_kernels import use_cpp_kernels
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import Listener, Trainer
from veneer.training.process_memory import highest

ROWS = 16
BASE = "smollm2-135m"
Run = Callable[[], object]


def main() -> None:
    """Run the named parts, print the results, and write them as JSON if requested."""
    parts: dict[str, Callable[[int], Iterator[tuple[str, Any]]]] = {
        "forward": forward,
        "peft": peft,
        "jobs": jobs,
        "memory": memory,
        "bank": bank,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=", ".join(parts))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one-of-memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_of_memory:
        print(json.dumps(highest_of(*map(int, args.one_of_memory.split(",")))))
        return
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(f"torch {found['torch']}, {found['threads']} threads")
    for name in args.part or parts:
        found[name] = {}
        for key, value in parts[name](args.rounds):
            found[name][key] = value
            print(f"{name:8} {key:44} {value}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def quotients(one: Run, other: Run, rounds: int) -> dict[str, float]:
    """Time of ``one`` / time of ``other``, measured in turn, in alternating order."""
    seconds: dict[Run, list[float]] = {one: [], other: []}
    for run in (one, other, one, other):
        run()
    for number in range(rounds):
        for run in (one, other) if number % 2 else (other, one):
            began = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - began)
    found = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
    middle = statistics.median
    return {
        "median": round(middle(found), 3),
        "min": round(min(found), 3),
        "max": round(max(found), 3),
        "ms": round(1e3 * middle(seconds[one]), 2),
        "ms_other": round(1e3 * middle(seconds[other]), 2),
    }


# Mixed forward passes


def adapters(model: torch.nn.Module, methods: Sequence[LoRA | DoRA]) -> tuple[Any, list[str]]:
    """A bank with frozen adapters whose B is not zero."""
    found = attach(model)
    names = [f"a{i}" for i in range(len(methods))]
    draw = torch.Generator().manual_seed(0)
    for name, method in zip(names, methods, strict=True):
        adapter = found.add(name, method)
        with torch.no_grad():
            for own in adapter.tensors.values():
                own["lora_B"].normal_(0, 0.01, generator=draw)
        adapter.requires_grad_(False)
    return found, names


MIXTURES: dict[str, list[LoRA | DoRA]] = {
    "LoRA r=16": [LoRA(r=16)] * ROWS,
    "LoRA and DoRA, r=4 to 64": [(DoRA if i % 2 else LoRA)(r=(4, 8, 16, 64)[i // 2 % 4]) for i in range(ROWS)],
}


def forward(rounds: int) -> Iterator[tuple[str, Any]]:
    """16 rows on 16 adapters / 16 rows on one of them."""
    base = load_base(BASE)
    yield "dtype", str(base.dtype)
    use_fast_forwards(base.model)
    use_cpp_kernels()  # as in evaluation
    for title, methods in MIXTURES.items():
        held, names = adapters(base.model, methods)
        for tokens in (1, 64):
            ids = torch.randint(3, 40_000, (ROWS, tokens), generator=torch.Generator().manual_seed(1))
            mixed, alone = _call(base.model, held, names, ids), _call(base.model, held, names[-1], ids)
            yield f"{title}, {tokens} a row: mixed over one", quotients(mixed, alone, rounds)
        held.detach()


def _call(model: Any, held: Any, route: Any, ids: torch.Tensor) -> Run:
    @torch.no_grad()
    def run() -> Any:
        with held.use(route):
            return model(input_ids=ids, logits_to_keep=1, use_cache=False).logits

    return run


def peft(rounds: int) -> Iterator[tuple[str, Any]]:
    """PEFT's mixed batch / ours, 16 rows on 16 adapters of 168 small layers."""
    from peft import LoraConfig, get_peft_model

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 24, "num_attention_heads": 4}
    model: Any = tiny("llama", num_key_value_heads=2, **sizes).eval()
    plain = copy.deepcopy(model)
    held, names = adapters(model, [LoRA(r=8, lora_alpha=16)] * ROWS)
    use_fast_forwards(model)
    use_cpp_kernels()
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(plain, config, adapter_name=names[0]).eval()
        for name in names[1:]:
            theirs.add_adapter(name, config)
        for name in names:
            for site, own in held[name].tensors.items():
                layer = theirs.base_model.model.get_submodule(site)
                for key, value in own.items():
                    getattr(layer, key)[name].weight.data.copy_(value)
    for tokens in (1, 64):
        ids = torch.randint(3, 300, (ROWS, tokens), generator=torch.Generator().manual_seed(1))

        @torch.no_grad()
        def other(ids: torch.Tensor = ids) -> torch.Tensor:
            out: torch.Tensor = theirs(input_ids=ids, adapter_names=names, use_cache=False).logits[:, -1:]
            return out

        ours = _call(model, held, names, ids)
        yield f"{tokens} a row: largest difference of logits", float((ours() - other()).abs().max())
        yield f"{tokens} a row: PEFT over ours", quotients(other, ours, rounds)


# Jobs


def made_jobs(count: int, tokens: int, batch: int = 1, r: int = 16) -> tuple[Stepper, list[Job]]:
    """LoRA and DoRA jobs on the embedded model, with examples of a given length, half of each trained."""
    base = load_base(BASE)
    held = attach(base.model)
    found = []
    for i in range(count):
        name = f"job{i}"
        held.add(name, (DoRA if i % 2 else LoRA)(r=r), seed=i)
        options = TrainOptions(data=("rows",), batch_size=batch, steps=10_000, learning_rate=1e-5)
        found.append(Job(name, options, held, rows_of(name, tokens), [], peak=1e-5, steps=10_000))
    return Stepper(FlatRunner(base.model), held), found


def rows_of(name: str, tokens: int) -> list[Example]:
    """Eight random examples of a given length, the second half of each trained."""
    draw = torch.Generator().manual_seed(len(name) + ord(name[-1]))
    rows = [torch.randint(3, 40_000, (tokens,), generator=draw).tolist() for _ in range(8)]
    weights = (0.0,) * (tokens // 2) + (1.0,) * (tokens - tokens // 2)
    return [Example(tuple(row), weights, f"{name}:{k}") for k, row in enumerate(rows)]


def jobs(rounds: int) -> Iterator[tuple[str, Any]]:
    """Four jobs in turn / the same four together: forward, backward and optimizer steps."""
    stepper, own = made_jobs(8, 256)
    use_fast_forwards(stepper.runner.model)
    use_cpp_kernels()  # as in a run
    yield from _shared(stepper, own, rounds)


def _shared(stepper: Stepper, own: list[Job], rounds: int) -> Iterator[tuple[str, Any]]:
    for count, tokens in ((4, 32), (8, 32), (4, 128), (4, 256)):
        for job in own:
            job.examples = rows_of(job.name, tokens)
        together = Trainer(stepper, own[:count], Listener(), tokens_per_pass=1024, tokens_per_shared_pass=4096)
        in_turn = Trainer(stepper, own[:count], Listener(), tokens_per_pass=1024, tokens_per_shared_pass=0)
        title = f"{count} jobs of {tokens} tokens: in turn over together"
        yield title, quotients(in_turn.round, together.round, rounds if tokens == 32 else max(3, rounds // 3))


def memory(rounds: int) -> Iterator[tuple[str, Any]]:
    """Peak memory of separate processes: eight jobs, and one job with passes of as many tokens."""
    for tokens, batch in ((32, 1), (128, 2)):
        many, one = _apart(8, tokens, batch), _apart(1, tokens, 8 * batch)
        own = many["own_bytes"] - one["own_bytes"]
        title = f"8 jobs of {batch} x {tokens} tokens"
        yield f"{title}: MB", round(many["highest"] / 1e6)
        yield f"{title}: MB of one job, of what is the others' own", [round(one["highest"] / 1e6), round(own / 1e6)]
        yield f"{title}: over one job's and their own", round(many["highest"] / (one["highest"] + own), 3)


def _apart(*arguments: int) -> dict[str, int]:
    line = [sys.executable, "-m", "bench.mixed", "--one-of-memory", ",".join(map(str, arguments))]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def highest_of(count: int, tokens: int, batch: int) -> dict[str, int]:
    """Peak memory of this process after a few rounds, and the bytes of adapters, gradients and optimizers."""
    stepper, own = made_jobs(count, tokens, batch)
    trainer = Trainer(stepper, own, Listener(), tokens_per_pass=4096, tokens_per_shared_pass=4096)
    for _ in range(4):
        trainer.round()
    held = sum(p.numel() * p.element_size() for job in own for p in job.parameters)
    return {"highest": highest(), "own_bytes": 4 * held}


# The bank


def bank(rounds: int) -> Iterator[tuple[str, Any]]:
    """Time to add, load and remove an adapter beside a thousand others / the same in an empty bank."""
    base = load_base(BASE)
    held = attach(base.model)
    method = LoRA(r=1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        held.add("first", method)
        held.save("first", folder)
        held.remove("first")
        seconds: dict[str, list[list[float]]] = {"add": [], "load": [], "remove": []}
        for size in (0, 999):
            for number in range(len(held), size):
                held.add(f"a{number}", method, seed=number)
            acts: dict[str, Run] = {
                "add": lambda: held.add("one", method),
                "load": lambda: held.load(folder, name="two"),
                "remove": lambda: held.remove("one"),
            }
            for key in acts:
                seconds[key].append([])
            for _ in range(max(9, rounds)):
                for key, act in acts.items():
                    began = time.perf_counter()
                    act()
                    seconds[key][-1].append(time.perf_counter() - began)
                held.remove("two")
    for key, (first, last) in seconds.items():
        a, b = statistics.median(first), statistics.median(last)
        yield (
            f"{key} beside 999 over the first",
            {
                "ratio_of_medians": round(b / a, 3),
                "ms_first": round(1e3 * a, 2),
                "ms_last": round(1e3 * b, 2),
                "ms_last_max": round(1e3 * max(last), 2),
            },
        )


if __name__ == "__main__":
    main()
