"""Make the tables of docs/composing.md: three adapters of the embedded model on three tasks, and their retention per operation.

    python docs/scripts/composing.py --work runs/composing              train, compose, evaluate, and write the tables into the page
    python docs/scripts/composing.py --work runs/composing --only ties  one operation (finished parts stay in the folder)

Retention of a task is the share of its adapter's gain that the composition keeps, in held-out loss:

    (L_base - L_composed) / (L_base - L_single)

1 is as good as the task's own adapter, 0 as the base, below 0 worse than the base. About five minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from three_tasks import BASE, TASKS, Evaluator, cached, write_tasks

import veneer
from veneer.adapters import Adapter
from veneer.checkpoints import read_adapter
from veneer.compose.combine import Composition, combine
from veneer.compose.ops import OperationSettings
from veneer.compose.search import search_weights
from veneer.deltas.parents import Parent, copy_as

PAGE = Path(__file__).resolve().parents[1] / "composing.md"
BEGIN, END = "<!-- table: docs/scripts/composing.py -->", "<!-- end of the table -->"
RANK, STEPS = 8, 48
Make = Callable[[list[Adapter]], Composition]


def main() -> None:
    """Train, compose, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/composing"), help="folder of adapters and results")
    parser.add_argument("--only", choices=("train", *OPERATIONS, "search"), help="run only this part")
    args = parser.parse_args()
    files = write_tasks(args.work / "data")
    train(args.work, files, args.only)
    if args.only == "train":
        return
    results = args.work / "figures.json"
    evaluator = Evaluator(files)
    adapters = [read_adapter(args.work / task / "adapter", task) for task in TASKS]
    for adapter in adapters:
        evaluator.bank.insert(copy_as(adapter, adapter.name))
    for route in (None, *TASKS):
        cached(results, route or "base", lambda route=route: evaluator.losses(route))
    if args.only in (None, "search"):
        cached(results, "search", lambda: search(evaluator))
    for name in OPERATIONS if args.only is None else [args.only] if args.only in OPERATIONS else []:
        cached(results, name, lambda name=name: operation(name, adapters, evaluator, results))
    write_page(json.loads(results.read_text(encoding="utf-8")))


def train(work: Path, files: dict[str, dict[str, Path]], only: str | None) -> None:
    """Train an adapter per task, unless it exists."""
    for task in TASKS:
        if not (work / task / "adapter").is_dir():
            options: dict[str, Any] = {"r": RANK, "lora_alpha": 2.0 * RANK, "batch_size": 8, "learning_rate": 1e-3}
            options |= {"steps": STEPS, "warmup_steps": 5, "eval_every": STEPS, "plan": False, "base": BASE}
            veneer.train(
                {"data": (files[task]["train"],), "valid": (files[task]["valid"],), "out": work / task, **options}
            )


def _of(
    adapters: list[Adapter], op: str, weight: float = 1.0, settings: OperationSettings | None = None, **more: Any
) -> Composition:
    return combine(op, [Parent(adapter, weight) for adapter in adapters], settings=settings, **more)


def _outside(adapters: list[Adapter]) -> Composition:
    """Sum of the adapters, each restricted to what lies outside the ones before it."""
    kept = [adapters[0]]
    for place, adapter in enumerate(adapters[1:], 1):
        made = combine("outside", [Parent(adapter), *(Parent(other) for other in adapters[:place])])
        kept.append(copy_as(made.adapter, adapter.name))
    return _of(kept, "sum")


OPERATIONS: dict[str, tuple[str, Make]] = {
    "average": ("naive average of the changes", lambda a: _of(a, "sum", 1 / 3)),
    "sum": ("sum", lambda a: _of(a, "sum")),
    "sum-rank": (f"sum, cut to rank {RANK}", lambda a: _of(a, "sum", rank=RANK)),
    "average-rank": (f"average, cut to rank {RANK}", lambda a: _of(a, "sum", 1 / 3, rank=RANK)),
    "ties": ("TIES, density 0.2", lambda a: _of(a, "ties", settings=OperationSettings(density=0.2))),
    "dare": ("DARE, drop 0.9, average", lambda a: _of(a, "dare", 1 / 3, OperationSettings(drop=0.9))),
    "iso-c": ("Iso-C", lambda a: _of(a, "iso-c")),
    "outside": ("each outside the ones before it, then the sum", _outside),
    "peft-linear": ("PEFT's sum of factors, weights 1/3", lambda a: _of(a, "peft_linear", 1 / 3)),
}


def operation(name: str, adapters: list[Adapter], evaluator: Evaluator, results: Path) -> dict[str, Any]:
    """Compose, evaluate, and print the error of the stored result."""
    began = time.perf_counter()
    made = OPERATIONS[name][1](adapters)
    seconds = time.perf_counter() - began
    evaluator.bank.insert(copy_as(made.adapter, "composed"))
    found = evaluator.losses("composed")
    evaluator.bank.remove("composed")
    rank = sorted({site.rank for site in made.sites})[-1]
    print(f"{name}: {found} in {seconds:.1f} s, error {made.error:.3g}", flush=True)
    return {"losses": found, "error": made.error, "rank": rank, "seconds": seconds}


def search(evaluator: Evaluator, budget: int = 24) -> dict[str, Any]:
    """Weights with the lowest mean retention loss, searched on a third of the held-out rows and evaluated on the others."""
    seen, unseen = (
        {t: evaluator.sets[t][::3] for t in TASKS},
        {t: [e for i, e in enumerate(evaluator.sets[t]) if i % 3] for t in TASKS},
    )
    whole = dict(evaluator.sets)

    def on(sets: dict[str, Any], route: Any) -> dict[str, float]:
        evaluator.sets = sets
        try:
            return evaluator.losses(route)
        finally:
            evaluator.sets = whole

    ends = {task: (on({task: seen[task]}, None)[task], on({task: seen[task]}, task)[task]) for task in TASKS}

    def score(weights: tuple[float, ...]) -> float:
        losses = on(seen, dict(zip(TASKS, weights, strict=True)))
        return -sum((ends[t][0] - losses[t]) / (ends[t][0] - ends[t][1]) for t in TASKS) / 3

    found = search_weights(score, 3, budget=budget)
    mix = dict(zip(TASKS, found.weights, strict=True))
    rest = {**unseen, "general": whole["general"]}
    print("searched", mix, flush=True)
    singles = {task: on({task: unseen[task]}, task)[task] for task in TASKS}
    return {"weights": found.weights, "losses": on(rest, mix), "base": on(unseen, None), "single": singles}


def write_page(results: dict[str, Any]) -> None:
    """Write the tables of all finished parts into the page."""
    base, single = results["base"], {task: results[task][task] for task in TASKS}
    rows = [[name, *(f"{results[name][key]:.3f}" for key in (*TASKS, "general"))] for name in ("base", *TASKS)]
    table = _markdown(["held-out loss of", *TASKS, "general text"], rows)
    ends = {task: (base[task], single[task]) for task in TASKS}
    kept = [_kept(OPERATIONS[name][0], ends, results[name]) for name in OPERATIONS if name in results]
    if (own := results.get("search")) is not None:
        weights = ", ".join(f"{weight:g}" for weight in own["weights"])
        seen = {task: (own["base"][task], own["single"][task]) for task in TASKS}
        kept.append(_kept(f"sum, weights searched ({weights})", seen, {**own, "rank": 3 * RANK, "error": 0.0}))
    if kept:
        table += "\n\n" + _markdown(["retention", *TASKS, "mean", "general text", "rank", "error"], kept)
    text = PAGE.read_text(encoding="utf-8")
    made = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text, flags=re.S)
    PAGE.write_text(made, encoding="utf-8")
    print(table)


def _kept(title: str, ends: dict[str, tuple[float, float]], own: dict[str, Any]) -> list[str]:
    """A row of the retention table. ends: loss of the base and of the task's own adapter."""
    shares = [(base - own["losses"][task]) / (base - single) for task, (base, single) in ends.items()]
    mean = sum(shares) / len(shares)
    numbers = [f"{own['losses']['general']:.3f}", str(own["rank"]), f"{own['error']:.1%}"]
    return [title, *(f"{share:.2f}" for share in shares), f"{mean:.2f}", *numbers]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    main()
