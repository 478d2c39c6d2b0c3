"""Make the tables of docs/continual.md: three tasks in sequence on the embedded model, and the forgetting of each way.

    python docs/scripts/continual.py --work runs/continual
    python docs/scripts/continual.py --work runs/continual --only penalty      one way; what is done is kept in the folder

joint        one adapter, the rows of all tasks together, as many steps as the others in total
sequential   one adapter that goes on from task to task: plain sequential LoRA
stacked      a new adapter for each task on top of the earlier ones, which act and stay as they are      --on-top-of
             (and so what was learnt is still there: each task is also evaluated with the adapters up to it)
penalty      the same, with the penalty on the overlap of the A factors                                  --orthogonal-to
projection   the same, with A kept out of what the earlier ones read                                     --orthogonal projection

After each task every task is evaluated on held-out rows. Forgetting of a task: its loss at the end minus its loss when it had just been
learnt. About ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from three_tasks import BASE, TASKS, Evaluator, cached, write_tasks

import veneer
from veneer.checkpoints import attach
from veneer.config import TrainOptions
from veneer.data.chat.render import Renderer
from veneer.data.dataset import load_examples
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import Listener, Trainer

PAGE = Path(__file__).resolve().parents[1] / "continual.md"
BEGIN, END = "<!-- table: docs/scripts/continual.py -->", "<!-- end of the table -->"
WAYS = ("sequential", "stacked", "penalty", "projection", "joint")
STEPS, RATE = 24, 1e-3
OPTIONS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16.0,
    "batch_size": 4,
    "learning_rate": RATE,
    "warmup_steps": 3,
    "plan": False,
    "base": BASE,
}
Losses = dict[str, float]


def main() -> None:
    """Train every way, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/continual"), help="folder of runs and results")
    parser.add_argument("--only", choices=WAYS, help="run only this way")
    args = parser.parse_args()
    files = write_tasks(args.work / "data")
    results = args.work / "figures.json"
    known = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    selected = [way for way in ([args.only] if args.only else WAYS) if way not in known]
    evaluator = Evaluator(files, rows=16, general=2) if selected or "base" not in known else None
    if evaluator is not None:
        cached(results, "base", lambda: evaluator.losses(None))
        for way in selected:
            cached(results, way, lambda way=way: learn(way, args.work, files, evaluator))
    if args.only is None:
        write_page(json.loads(results.read_text(encoding="utf-8")))


def learn(way: str, work: Path, files: dict[str, dict[str, Path]], evaluator: Evaluator) -> list[Losses]:
    """Losses of every task after each stage."""
    if way == "sequential":
        return sequential(work, files, evaluator)
    if way == "joint":
        data = tuple(files[task]["train"] for task in TASKS)
        run(work / "joint", data, steps=3 * STEPS)
        return [evaluate(evaluator, [work / "joint"])]
    stages, earlier = [], []
    for task in TASKS:
        # The first task is learnt the same by all of them.
        out = work / ("first" if not earlier else f"{way}-{task}")
        more: dict[str, Any] = {"on_top_of": tuple(earlier)} if earlier else {}
        if earlier and way in ("penalty", "projection"):
            more |= {"orthogonal_to": tuple(earlier), "orthogonal": way}
        run(out, (files[task]["train"],), steps=STEPS, **more)
        earlier.append(out)
        stages.append(evaluate(evaluator, earlier))
        print(way, task, stages[-1], flush=True)
    return stages


def run(out: Path, data: tuple[Path, ...], **more: Any) -> None:
    """Train a run, unless it is finished."""
    if not (out / "adapter").is_dir():
        veneer.train({"data": data, "out": out, **OPTIONS, **more})


def evaluate(evaluator: Evaluator, runs: Iterable[Path]) -> Losses:
    """Losses under the sum of the runs' adapters."""
    names = [f"stage-{i}" for i, out in enumerate(runs) if evaluator.bank.load(out / "adapter", name=f"stage-{i}")]
    found = evaluator.losses(dict.fromkeys(names, 1.0))
    for name in names:
        evaluator.bank.remove(name)
    return found


def sequential(work: Path, files: dict[str, dict[str, Path]], evaluator: Evaluator) -> list[Losses]:
    """One adapter through all tasks, from the first run on, with a new optimizer per task."""
    run(work / "first", (files[TASKS[0]]["train"],), steps=STEPS)
    base = load_base(BASE)
    bank, stages = attach(base.model), [evaluate(evaluator, [work / "first"])]
    adapter = bank.load(work / "first" / "adapter", name="all")
    adapter.requires_grad_(True)
    stepper = Stepper(FlatRunner(base.model), bank)
    for task in TASKS[1:]:
        examples, _ = load_examples([files[task]["train"]], Renderer(base.tokenizer))
        options = TrainOptions(data=(files[task]["train"],), steps=STEPS, **OPTIONS)
        job = Job("all", options, bank, examples, [], peak=RATE, steps=STEPS)
        Trainer(stepper, [job], Listener(), tokens_per_pass=1024, tokens_per_shared_pass=0).run()
        assert job.progress.step == STEPS, job.reason
        bank.save("all", out := work / f"sequential-{task}", base_name=BASE)
        name = evaluator.bank.load(out, name="all").name
        stages.append(evaluator.losses(name))
        evaluator.bank.remove(name)
        print("sequential", task, stages[-1], flush=True)
    return stages


def write_page(results: dict[str, Any]) -> None:
    """Write the tables into the page."""
    head = ["", *TASKS, "mean", "general text"]
    base = results["base"]
    rows = [["base", *(f"{base[t]:.3f}" for t in TASKS), f"{_mean(base):.3f}", f"{base['general']:.3f}"]]
    rows.append(
        [
            "stacked, each task with the adapters up to its own",
            *(f"{results['stacked'][i][t]:.3f}" for i, t in enumerate(TASKS)),
            f"{sum(results['stacked'][i][t] for i, t in enumerate(TASKS)) / len(TASKS):.3f}",
            "",
        ]
    )
    lost = []
    for way in ("joint", *WAYS[:-1]):
        end = results[way][-1]
        rows.append([way, *(f"{end[t]:.3f}" for t in TASKS), f"{_mean(end):.3f}", f"{end['general']:.3f}"])
        if way != "joint":
            apart = [end[t] - results[way][i][t] for i, t in enumerate(TASKS[:-1])]
            lost.append([way, *(f"{a:+.3f}" for a in apart), f"{sum(apart) / len(apart):+.3f}"])
    table = _markdown(["held-out loss at the end", *head[1:]], rows)
    table += "\n\n" + _markdown(["forgotten since it was learnt", *TASKS[:-1], "mean"], lost)
    text = PAGE.read_text(encoding="utf-8")
    made = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text, flags=re.S)
    PAGE.write_text(made, encoding="utf-8")
    print(table)


def _mean(losses: Losses) -> float:
    return sum(losses[task] for task in TASKS) / len(TASKS)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    main()
