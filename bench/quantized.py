"""Training on quantized bases: quality, time and memory beside a bf16 base, and a base of Llama-2-7B's shape.

    python -m bench.quantized quality          the demo's data on the embedded model, 70 steps: held-out losses and peak memory
    python -m bench.quantized steps            steps of bf16 and NF4, LoRA and DoRA, taken in turn: ratios of their times
    python -m bench.quantized large DIR        a random 7B base, written in NF4 to DIR (4 GB), loaded and trained on 256 tokens a step

The random base has the config of Llama-2-7B. Each training is a process of its own, so that its peak is its own. `--cpu` compares
the processor's time, for a machine that is busy.
"""

from __future__ import annotations

import veneer  # isort: skip  (before torch, as in a command)

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from veneer.config import TrainOptions
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.training.loop.job import Job
from veneer.training.loop.trainer import Listener, Trainer
from veneer.training.process_memory import highest, resident
from veneer.training.run.jobs import expand
from veneer.training.run.setup import Setup, set_up

METHODS = ("lora", "dora")
CASES = [(quantize, method) for method in METHODS for quantize in (None, "nf4")]
BASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "nf4": {"quantize": "nf4"},
    "calibrated": {"quantize": "nf4", "calibrate": True},
}
"""Bases of ``quality``, with their options."""
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def main() -> None:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("quality", "steps", "large", "child"))
    parser.add_argument("place", nargs="?", help="folder of the large base, or the options of a child")
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--base", choices=tuple(BASES), action="append", help="only this base (quality; may be repeated)"
    )
    parser.add_argument(
        "--method", choices=METHODS, action="append", help="only this method (quality; may be given twice)"
    )
    parser.add_argument("--cpu", action="store_true", help="compare processor time")
    args = parser.parse_args()
    if args.part == "child":
        print(json.dumps(_child(json.loads(args.place))))
    elif args.part == "large":
        _large(Path(args.place), args.steps if args.steps != 70 else 3)
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = _demo_data(Path(folder))
            (_quality if args.part == "quality" else _steps)(files, Path(folder), args)


def _demo_data(folder: Path) -> tuple[Path, Path]:
    """The demo's rows: (training, held out)."""
    from veneer.data.stdlib_docs import stdlib_pairs

    train, valid = stdlib_pairs()
    files = folder / "train.jsonl", folder / "valid.jsonl"
    for file, rows in zip(files, (train, valid[:: max(1, len(valid) // 96)][:96]), strict=True):
        file.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows), encoding="utf-8")
    return files


def _options(files: tuple[Path, Path], **more: Any) -> dict[str, Any]:
    """The demo's options."""
    fixed = {"r": 16, "learning_rate": 5e-4, "batch_size": 7, "tokens_per_pass": 768, "warmup_steps": 5, "plan": False}
    return {"data": [str(files[0])], "valid": [str(files[1])], "dtype": "bfloat16", **fixed, **more}


def _quality(files: tuple[Path, Path], folder: Path, args: argparse.Namespace) -> None:
    print(
        "| base | method | loss of the base | held-out loss | s a step | peak GB |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for method, base in ((method, base) for method in args.method or METHODS for base in args.base or BASES):
        out = folder / f"{base}-{method}"
        more = {"steps": args.steps, "eval_every": args.steps, "out": str(out), "method": method, **BASES[base]}
        found = _in_child(_options(files, **more))
        print(
            f"| {base} | {method} | {found['first']:.4f} | {found['loss']:.4f} | {found['step']:.2f} | {found['peak']:.2f} |",
            flush=True,
        )


def _in_child(options: dict[str, Any]) -> dict[str, Any]:
    words = [sys.executable, "-m", "bench.quantized", "child", json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _child(options: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    result = veneer.train(options)
    losses = [loss for _, loss in next(iter(result.jobs.values())).losses]
    seconds = (time.perf_counter() - began) / options["steps"]
    return {"loss": losses[-1], "first": losses[0], "step": seconds, "peak": highest() / 1e9}


def _steps(files: tuple[Path, Path], folder: Path, args: argparse.Namespace) -> None:
    """Steps of each case on the same rows, in turn, in one process."""
    clock = time.process_time if args.cpu else time.perf_counter
    with ExitStack() as stack:
        setups = []
        for quantize, method in CASES:
            options = TrainOptions(**_options(files, steps=99, method=method, quantize=quantize))
            setups.append(stack.enter_context(set_up(options, expand(options), None, lambda line: None)))
        times: list[list[float]] = [[] for _ in CASES]
        for number in range(args.rounds + 1):
            for setup, found in zip(setups, times, strict=True):
                began = clock()
                _step(setup, number)
                found.append(clock() - began)
    medians = [statistics.median(found[1:]) for found in times]
    print("| base | method | s a step | of bf16 | of LoRA |\n|---|---|---|---|---|")
    for number, (quantize, method) in enumerate(CASES):
        plain, lora = medians[number - number % 2], medians[number % 2]
        row = f"{medians[number]:.3f} | {medians[number] / plain:.2f} | {medians[number] / lora:.2f}"
        print(f"| {quantize or 'bf16'} | {method} | {row} |")


def _step(setup: Setup, number: int) -> None:
    job = setup.jobs[0]
    rows = [setup.data[job.name].train[7 * number + index] for index in range(7)]
    for piece in _pieces(rows):
        setup.stepper.forward_backward(make_batch(piece, [job.name] * len(piece)))
    for parameter in setup.bank.parameters(job.name):
        parameter.grad = None


def _pieces(rows: list[Any], most: int = 768) -> Iterator[list[Any]]:
    held: list[Any] = []
    for row in rows:
        if held and sum(map(len, held)) + len(row) > most:
            yield held
            held = []
        held.append(row)
    yield held


def _large(folder: Path, steps: int) -> None:
    """Write, load and train a base of Llama-2-7B's shape."""
    if not (folder / "config.json").is_file():
        _write_large(folder)
    for method in ("lora", "dora"):
        words = [sys.executable, "-c", _TRAIN_LARGE, str(folder), method, str(steps)]
        print(subprocess.run(words, check=True, capture_output=True, text=True).stdout, end="", flush=True)


_TRAIN_LARGE = """
import sys
from bench.quantized import train_large
train_large(sys.argv[1], sys.argv[2], int(sys.argv[3]))
"""


def train_large(folder: str, method: str, steps: int) -> None:
    """Load the base, train on 256 tokens a step as a run does, and print memory and time beside the planner's estimate."""
    from veneer.adapters import METHODS
    from veneer.checkpoints import attach
    from veneer.models.fast_modules import use_fast_forwards
    from veneer.models.flat import FlatRunner
    from veneer.models.load import load_base
    from veneer.training.cpp_kernels import use_cpp_kernels
    from veneer.training.loop.step import Stepper
    from veneer.training.planning.fitting import memory_of, shape_of

    planned = memory_of(shape_of(Path(folder), method), "nf4", METHODS[method], 16, 256, checkpointing=False)
    use_cpp_kernels()
    began = time.perf_counter()
    base = load_base(folder, dtype="bfloat16")
    took, loaded = time.perf_counter() - began, f"{resident() / 1e9:.2f} GB, peak {highest() / 1e9:.2f} GB"
    print(f"{method}: loaded in {took:.0f} s, {loaded}; planned for a step: {planned / 1e9:.2f} GB", flush=True)
    bank = attach(base.model)
    bank.add("a", METHODS[method](r=16, lora_alpha=32))
    use_fast_forwards(base.model)
    options = TrainOptions(data=("rows",), batch_size=1, steps=steps, learning_rate=1e-4, warmup_steps=0, method=method)
    ids = torch.randint(3, 32000, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    example = Example(tuple(ids), (0.0, *[1.0] * 255), "random")
    job = Job("a", options, bank, [example], [], peak=1e-4, steps=steps)
    stepper = Stepper(FlatRunner(base.model), bank)
    Trainer(stepper, [job], _Told(method), tokens_per_pass=256, tokens_per_shared_pass=256).run()


class _Told(Listener):
    """Prints the loss, the time and the peak of each step."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.began = time.perf_counter(), time.process_time()

    def stepped(self, job: Job, metrics: dict[str, float]) -> None:
        ends = time.perf_counter(), time.process_time()
        wall, own = (end - start for end, start in zip(ends, self.began, strict=True))
        self.began = ends
        times, peak = f"{wall:.1f} s ({own:.1f} s of the processor)", f"peak {highest() / 1e9:.2f} GB"
        print(f"{self.method}: step {job.progress.step} loss {metrics['loss']:.3f} in {times}, {peak}", flush=True)


def _write_large(folder: Path) -> None:
    """A random model in NF4, written tensor by tensor; layers of one shape have the same values."""
    import transformers

    from veneer.checkpoints.model_folder import ModelFolder, write_model
    from veneer.kernels.quantized.state import quantize, state_of
    from veneer.models.quantized.scheme import scheme_for

    scheme = scheme_for("nf4")
    config = {**LLAMA_7B, "quantization_config": scheme.as_config(torch.bfloat16)}
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_7B))
    states: dict[torch.Size, dict[str, torch.Tensor]] = {}
    with tempfile.TemporaryDirectory() as empty:
        source = object.__new__(ModelFolder)
        source.path = Path(empty)
        with write_model(source, folder, config) as writer:
            for name, parameter in model.named_parameters():
                if "_proj" not in name:
                    writer.put(
                        name,
                        _random(parameter.shape) if parameter.dim() > 1 else torch.ones(parameter.shape).bfloat16(),
                    )
                    continue
                if parameter.shape not in states:
                    states[parameter.shape] = state_of(quantize(_random(parameter.shape), "nf4"))
                for key, value in states[parameter.shape].items():
                    writer.put(name.removesuffix("weight") + key, value.clone())


def _random(shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).mul_(0.02)


if __name__ == "__main__":
    main()
