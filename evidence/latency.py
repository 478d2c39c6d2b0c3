"""What an adapter adds to a forward, merged and not merged (LoRA, arXiv 2106.09685, Table 1).

    python -m evidence.latency --out runs/evidence/latency
    python -m evidence.latency --out runs/evidence/latency --table

One forward of a batch is measured in CPU seconds of one thread, which other work on the machine disturbs less than the clock. Contestants
take turns, and each turn is compared with the base's turn beside it; the table has the median of the ratios. Merged means that the weights
of the model are replaced by W' = W + s B A, as ``veneer merge`` writes them.
"""

from __future__ import annotations

import veneer  # isort: skip  (before torch, as in a command)

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evidence.records import Records, machine, markdown
from veneer import DoRA, Houlsby, LoRA, Pfeiffer
from veneer.models.flat import FlatRunner
from veneer.models.layout import Flat
from veneer.models.load import load_base

SHAPES = ((1, 32), (1, 128), (8, 64))
METHODS: dict[str, Any] = {
    "lora r=8 q,v": LoRA(r=8, target_modules=("q_proj", "v_proj")),
    "lora r=8": LoRA(r=8),
    "lora r=64": LoRA(r=64),
    "dora r=8": DoRA(r=8),
    "Houlsby, 64": Houlsby(),
    "Pfeiffer, 64": Pfeiffer(),
}
FORMS = {label: ("adapter",) if method.no_delta else ("adapter", "merged") for label, method in METHODS.items()}
"""A bottleneck cannot be merged."""


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="METHOD")
    parser.add_argument("--table", action="store_true", help="print the table of the finished measurements")
    args = parser.parse_args()
    records = Records(args.out / "results.jsonl")
    if not args.table:
        torch.set_num_threads(1)
        measure(args.base, args.turns, records, args.methods)
    print(table(records))


def measure(name: str, turns: int, records: Records, methods: Sequence[str]) -> None:
    """Every method at every shape, adapter and merged, each beside the base."""
    base = load_base(name, dtype="float32")
    bank = veneer.attach(base.model)
    runner = FlatRunner(base.model)
    for label in methods:
        method = METHODS[label]
        keys = [f"{label} {rows}x{length} {form}" for rows, length in SHAPES for form in FORMS[label]]
        if all(key in records for key in keys):
            continue
        bank.add("a", method, seed=1)
        with torch.no_grad():  # a change of usual size
            for _, key, value in bank["a"].named_tensors():
                if key in ("lora_B", "adapter_up"):
                    value.normal_(0, 0.02)
        bank["a"].requires_grad_(False)
        merged = bank.merged_state_dict("a") if "merged" in FORMS[label] else {}
        plain = {key: value.detach().clone() for key, value in base.model.state_dict().items()}
        for rows, length in SHAPES:
            batch = Flat.of([[100 + at for at in range(length)] for _ in range(rows)])
            keep = torch.tensor([length - 1])
            if f"{label} {rows}x{length} adapter" not in records:

                def routed(route: str | None, batch: Flat = batch, keep: torch.Tensor = keep) -> float:
                    return forward(bank, runner, batch, keep, route)

                beside = turn_ratios(routed, (None, "a"), turns)
                records.add(f"{label} {rows}x{length} adapter", **beside, machine=machine())
            if merged and f"{label} {rows}x{length} merged" not in records:

                def at(weights: Any, batch: Flat = batch, keep: torch.Tensor = keep) -> float:
                    for key, parameter in base.model.state_dict().items():
                        parameter.copy_(weights[key])
                    return forward(bank, runner, batch, keep, None)

                with torch.no_grad():
                    beside = turn_ratios(at, (plain, merged), turns)
                    for key, parameter in base.model.state_dict().items():
                        parameter.copy_(plain[key])
                records.add(f"{label} {rows}x{length} merged", **beside, machine=machine())
        bank.remove("a")


def forward(bank: Any, runner: FlatRunner, batch: Flat, keep: torch.Tensor, route: str | None) -> float:
    """CPU seconds of one forward."""
    with torch.no_grad(), bank.use(route, training=False):
        runner.logits(batch, keep)  # warm: the weights were just written, or another route had the caches
        start = time.process_time()
        runner.logits(batch, keep)
        return time.process_time() - start


def turn_ratios(run: Any, pair: tuple[Any, Any], turns: int) -> dict[str, Any]:
    """Medians and quartiles of the second's time over the first's, in turns, and the first's milliseconds."""
    times = [[run(one) for one in pair] for _ in range(turns)]
    ratios = sorted(other / base for base, other in times[1:])
    low, middle, high = statistics.quantiles(ratios, n=4)
    base = statistics.median(base for base, _ in times[1:])
    found = {"ratio": middle, "low": low, "high": high}
    return {
        "base_ms": round(1e3 * base, 2),
        **{key: round(value, 4) for key, value in found.items()},
        "turns": turns - 1,
    }


def percent(one: dict[str, Any]) -> str:
    """The added time with its quartiles."""
    middle, low, high = (100 * (one[key] - 1) for key in ("ratio", "low", "high"))
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


def table(records: Records) -> str:
    """The finished measurements."""
    header = ["method", "form", *(f"{rows} x {length} tokens" for rows, length in SHAPES)]
    rows = []
    for label in METHODS:
        for form in FORMS[label]:
            found = [records.known.get(f"{label} {rows}x{length} {form}") for rows, length in SHAPES]
            cells = ["-" if one is None else percent(one) for one in found]
            rows.append([label, form, *cells])
    last = next(reversed(records.known.values()), {})
    return f"{markdown(header, rows)}\n\n{last.get('machine', '')}; load {last.get('load', '')}"


if __name__ == "__main__":
    main()
