"""Decoding speed of the engine as ratios to the time of reading the weights, and beside transformers and PEFT.

    python -m bench.serve [--rank 16] [--targets all-linear] [--rounds 20] [--threads N] [--cpu] [--peers]

    floor         bytes of the weights over this run's measured read rate
    1, 16         a decoding step of one and of sixteen base rows, as multiples of the floor
    16 adapters   sixteen rows on sixteen LoRA adapters, DoRA adapters and mixes of two, against sixteen base rows; beside it the
                  bytes of base and adapters together over those of the base, which is what reading alone would make
    first token   a prompt of 512 tokens to its first token, against transformers
    peers         one row against transformers' generate; with --peers sixteen requests on sixteen adapters at once against one after
                  another in transformers, and against PEFT's adapter_names, each with its largest difference in log-probability from
                  its own merged model

Both sides of a ratio are timed in turn. ``--cpu`` takes processor seconds, for a machine with other work; use it with one thread.
"""

from __future__ import annotations

import veneer  # noqa: F401  # isort: skip  (before torch, as in a command: it limits how long OpenMP's threads spin)

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from veneer import DoRA, LoRA
from veneer.checkpoints import attach
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.load import load_base
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import GenerationRequest, Mix, SamplingParams, TextDelta
from veneer.training.cpp_kernels import use_cpp_kernels

ROWS = 16
PROMPT = "The capital of France is a city that"
numbers = count()


class Bench:
    """One engine over the embedded base with sixteen LoRA and sixteen DoRA adapters."""

    def __init__(self, rank: int, targets: str, cpu: bool) -> None:
        self.clock = time.process_time if cpu else time.perf_counter
        use_cpp_kernels(print)
        self.base: Any = load_base("smollm2-135m", dtype="bfloat16")
        self.bank = attach(self.base.model)
        draw = torch.Generator().manual_seed(0)
        modules = targets if targets == "all-linear" else targets.split(",")
        for method in (LoRA(r=rank, target_modules=modules), DoRA(r=rank, target_modules=modules)):
            for number in range(ROWS):
                name = f"{method.name}{number}"
                self.bank.add(name, method, seed=number)
                for parameter in self.bank[name].requires_grad_(False).parameters():
                    parameter.data.add_(0.02 * parameter.std() * torch.randn(parameter.shape, generator=draw))
        use_fast_forwards(self.base.model)
        self.engine = Engine(self.base.model, self.base.tokenizer, self.bank)
        self.ids = tuple(self.base.tokenizer(PROMPT)["input_ids"])

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of one call."""
        begun = self.clock()
        work()
        return self.clock() - begun

    def request(self, mix: Mix, tokens: int, ids: tuple[int, ...] | None = None) -> GenerationRequest:
        """A greedy request that does not end early."""
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        return GenerationRequest(f"r{next(numbers)}", ids or self.ids, mix, sampling)

    def step(self, mixes: list[Mix], rounds: int) -> list[float]:
        """Seconds of decoding steps of rows with these mixes."""
        streams = [self.engine.submit(self.request(mix, rounds + 6)) for mix in mixes]
        for _ in range(4):
            self.engine.step()
        found = [self.timed(self.engine.step) for _ in range(rounds)]
        while self.engine.step():
            pass
        assert all(list(stream) for stream in streams)
        return found

    def bytes_over_base(self, mixes: list[Mix]) -> float:
        """Bytes of the base and of the mixes' adapters, in the forms that a step reads, over those of the base."""
        base = sum(p.numel() * p.element_size() for p in self.base.model.parameters())
        names = {name for mix in mixes for name, _ in mix}
        adapters = sum(
            parameter.numel() * (4 if key == "lora_magnitude_vector" else 2)
            for name in names
            for _, key, parameter in self.bank[name].named_tensors()
        )
        return 1 + adapters / base

    def floor(self, rounds: int) -> list[float]:
        """Seconds of reading as many bytes as the weights have."""
        size = sum(p.numel() * p.element_size() for p in self.base.model.parameters())
        block = torch.zeros(size // 4, dtype=torch.float32)
        return [self.timed(block.sum) for _ in range(rounds)]

    def whole(self, mixes: list[Mix], tokens: int) -> list[list[int]]:
        """The answers of concurrent requests."""
        streams = [self.engine.submit(self.request(mix, tokens)) for mix in mixes]
        while self.engine.step():
            pass
        return [[t for event in stream if isinstance(event, TextDelta) for t in event.tokens] for stream in streams]

    def generate(self, model: Any, ids: tuple[int, ...], tokens: int, rows: int = 1, **options: Any) -> Any:
        """transformers' generate, greedy, of this many tokens."""
        x = torch.tensor([ids] * rows)
        return model.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


def one(name: str, index: int) -> Mix:
    """The route of one adapter."""
    return ((f"{name}{index}", 1.0),)


def report(name: str, over: list[float], under: list[float], claim: str) -> None:
    """Print the ratio of medians, and the spread of the first."""
    ratio = statistics.median(over) / statistics.median(under)
    spread = f"{min(over) * 1e3:.1f} to {max(over) * 1e3:.1f} ms"
    print(f"{name:<52} {ratio:6.2f}x   ({spread}; claim: {claim})", flush=True)


def ratios(bench: Bench, rounds: int) -> None:
    """The engine by itself, and one row beside transformers."""
    floor = bench.floor(rounds)
    print(f"floor {statistics.median(floor) * 1e3:.1f} ms; runner {type(bench.engine.runner).__name__}")
    base: list[Mix] = [()]
    single, sixteen = bench.step(base, rounds), bench.step(base * ROWS, rounds)
    report("one row over the floor", single, floor, "at most 2.0")
    report("16 base rows over the floor", sixteen, floor, "at most 4")
    kinds: dict[str, list[Mix]] = {
        "LoRA": [one("lora", i) for i in range(ROWS)],
        "DoRA": [one("dora", i) for i in range(ROWS)],
        "mixes of two": [((f"lora{i}", 0.5), (f"dora{(i + 1) % ROWS}", 0.5)) for i in range(ROWS)],
    }
    for name, mixes in kinds.items():
        claim = f"at most 1.4; by bytes {bench.bytes_over_base(mixes):.2f}"
        report(f"16 rows on 16 adapters over 16 base rows, {name}", bench.step(mixes, rounds), sixteen, claim)
    with bench.bank.use(None):
        model = bench.base.model
        steps = [bench.timed(lambda: bench.generate(model, bench.ids, 12)) / 12 for _ in range(3)]
        report("transformers' token over one row", steps, single, "at least 2.5")
        long = tuple(range(1000, 1512))
        theirs = [bench.timed(lambda: bench.generate(model, long, 1)) for _ in range(3)]
    ours = []
    for number in range(3):  # another first token each time, so that no block is known
        ids = (2000 + number, *long[1:])
        ours.append(bench.timed(lambda ids=ids: list(bench.engine.run(bench.request((), 1, ids)))))  # type: ignore[misc]
    report("first token of 512, transformers' over the engine's", theirs, ours, "at least 1")


def peers(bench: Bench, tokens: int = 24) -> None:
    """Sixteen requests on sixteen adapters: together here, one after another in transformers, and with PEFT's adapter_names."""
    from peft import PeftModel

    mixes = [one("lora", i) for i in range(ROWS)]
    ours = [bench.timed(lambda: bench.whole(mixes, tokens)) for _ in range(2)]
    plain = copy.deepcopy(load_base("smollm2-135m", dtype="bfloat16").model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(ROWS):
            bench.bank.save(f"lora{i}", Path(folder) / f"lora{i}", base_name="smollm2-135m")
        model = PeftModel.from_pretrained(plain, str(Path(folder) / "lora0"), adapter_name="lora0")
        for i in range(1, ROWS):
            model.load_adapter(str(Path(folder) / f"lora{i}"), adapter_name=f"lora{i}")
    model.eval()

    def in_turn() -> None:
        for i in range(ROWS):
            model.set_adapter(f"lora{i}")
            bench.generate(model, bench.ids, tokens)

    names = [f"lora{i}" for i in range(ROWS)]

    def merged_in_turn() -> None:
        for _ in range(ROWS):  # merged weights cost what the base's do
            bench.generate(bench.base.model, bench.ids, tokens)

    with bench.bank.use(None):
        merged_alone = [bench.timed(merged_in_turn)]
    alone = [bench.timed(in_turn)]
    mixed = [bench.timed(lambda: bench.generate(model, bench.ids, tokens, ROWS, adapter_names=names)) for _ in range(2)]
    report("16 one after another in transformers, merged", merged_alone, ours, "at least 8")
    report("16 one after another in transformers with PEFT", alone, ours, "at least 8")
    report("PEFT's adapter_names over the engine's 16", mixed, ours, "at least 6")
    for i in (0, 7):
        merged = copy.deepcopy(bench.base.model)
        merged.load_state_dict(bench.bank.merged_state_dict(f"lora{i}"))
        print(
            f"lora{i}: largest difference in log-probability from the merged model: {_apart(bench, model, merged, i)}"
        )


def _apart(bench: Bench, peft: Any, merged: Any, index: int) -> str:
    """The largest differences, over an answer's tokens, of the engine's and PEFT's log-probabilities from the merged model's."""
    sampling = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=0)
    asked = GenerationRequest(f"r{next(numbers)}", bench.ids, one("lora", index), sampling)
    scores = [s for event in bench.engine.run(asked) if isinstance(event, TextDelta) for s in event.logprobs]
    ids = torch.tensor([[*bench.ids, *(s.token for s in scores)]])
    peft.set_adapter(f"lora{index}")
    with torch.no_grad():
        expected, other = (torch.log_softmax(m(ids).logits[0].float(), -1) for m in (merged, peft))
    start = len(bench.ids) - 1
    mine = max(abs(s.logprob - float(expected[start + i, s.token])) for i, s in enumerate(scores))
    theirs = max(abs(float(other[start + i, s.token] - expected[start + i, s.token])) for i, s in enumerate(scores))
    return f"engine {mine:.3f}, PEFT {theirs:.3f}"


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="all-linear", help="all-linear, or names of layers such as q_proj,v_proj")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.rank, args.targets, args.cpu)
    ratios(bench, args.rounds)
    if args.peers:
        peers(bench)


if __name__ == "__main__":
    main()
