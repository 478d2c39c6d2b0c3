"""One stream of text beside llama.cpp at equal bits: bf16 beside bf16, and int8 beside Q8_0.

    python -m bench.serve_llama_cpp --python PYTHON [--threads N] [--tokens 64] [--rounds 5] [--cpu] [--work runs/llama-cpp]

PYTHON is an interpreter with llama.cpp (``pip install xllamacpp`` has it built). The model is the embedded one with an adapter merged into
a GGUF file, and here the base with the adapter beside it. First the texts are compared: the number of characters at the beginning that are
the same. Then both write the same number of tokens in turn. ``--cpu`` compares processor seconds, for a machine with other work; use it
with ``--threads 1``. int8 quantizes the linear layers of the blocks; Q8_0 the embedding and the head as well.
"""

from __future__ import annotations

import veneer  # noqa: F401  # isort: skip  (before torch, as in a command: it limits how long OpenMP's threads spin)

import argparse
import itertools
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from veneer import LoRA
from veneer.checkpoints import attach
from veneer.cli.main import main as command
from veneer.models.load import load_base
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import GenerationRequest, Mix, SamplingParams, TextDelta
from veneer.training.cpp_kernels import use_cpp_kernels

PROMPT = "The capital of France is a city that"
FORMATS = {"bf16": (None, ["--dtype", "bf16"]), "8 bits": ("int8", ["--quantize", "q8_0"])}


class Ours:
    """An engine over the embedded base, and the adapter "a"."""

    def __init__(self, quantize: str | None, adapter: Path) -> None:
        base: Any = load_base("smollm2-135m", dtype="bfloat16", quantize=quantize)
        self.tokenizer = base.tokenizer
        self.engine = Engine(base.model, base.tokenizer, attach(base.model))
        self.engine.load_adapter("a", adapter)
        self.asked = 0

    def write(self, count: int, mix: Mix = ()) -> tuple[float, float, str]:
        """Seconds and processor seconds a token after the first, and the text."""
        self.asked += 1
        ids = tuple(self.tokenizer(PROMPT).input_ids)
        sampling = SamplingParams(max_tokens=count + 1, ignore_eos=True)
        stream = self.engine.submit(GenerationRequest(str(self.asked), ids, mix, sampling, salt=str(self.asked)))
        self.engine.step()
        begun, used = time.perf_counter(), time.process_time()
        while self.engine.step():
            pass
        seconds, used = time.perf_counter() - begun, time.process_time() - used
        return (
            seconds / count,
            used / count,
            "".join(event.text for event in stream if isinstance(event, TextDelta)),
        )


class Theirs:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, model: Path, threads: int) -> None:
        script = Path(__file__).with_name("peer_llama_cpp_server.py")
        self.process = subprocess.Popen(
            [python, str(script), str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def write(self, count: int) -> tuple[float, float, str]:
        """Seconds and processor seconds a token after the first, and the text."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([PROMPT, count]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("["):
                seconds, used, text = json.loads(line)
                return seconds, used, text
        raise SystemExit("llama.cpp ended; run its side by hand to see why")


def saved_adapter(work: Path) -> Path:
    """A folder with an adapter that changes the text a little."""
    bank = attach(load_base("smollm2-135m").model)
    bank.add("a", LoRA(r=8), seed=0)
    draw = torch.Generator().manual_seed(0)
    for parameter in bank["a"].requires_grad_(False).parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))
    bank.save("a", work / "a")
    return work / "a"


def main() -> None:
    """Print a row for each number of bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/llama-cpp"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_cpp_kernels(print)
    adapter = saved_adapter(args.work)
    column = 1 if args.cpu else 0
    for name, (quantize, words) in FORMATS.items():
        model = args.work / f"{name.replace(' ', '-')}.gguf"
        if not model.exists() and command(
            ["export", str(adapter), "--to", "gguf", "--merged", *words, "--out", str(model)]
        ):
            raise SystemExit(1)
        ours, theirs = Ours(quantize, adapter), Theirs(args.python, model, args.threads)
        one, other = ours.write(args.tokens, (("a", 1.0),))[2], theirs.write(args.tokens)[2]
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        print(f"{name}: the first {same} of {len(one)} characters are the same")
        rounds = [(ours.write(args.tokens)[column], theirs.write(args.tokens)[column]) for _ in range(args.rounds)]
        ratios = sorted(b / a for a, b in rounds)
        median = [statistics.median(times) * 1e3 for times in zip(*rounds, strict=True)]
        print(
            f"{name}: {median[0]:.1f} ms a token here, {median[1]:.1f} in llama.cpp; "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times as fast as llama.cpp"
        )
        theirs.process.kill()


if __name__ == "__main__":
    main()
