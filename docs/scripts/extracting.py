"""Makes the table and the curve of docs/extracting.md: a full fine-tune of the embedded model, and what adapters extracted from it keep.

    python docs/scripts/extracting.py --work runs/extracting

Every weight of the model is trained on docstrings; then an adapter of each rank is taken from the difference and judged on held-out rows
beside the full fine-tune. The adapter of rank r is the leading part of that of full rank: at each layer the best approximation of rank r,
which is what ``veneer extract --rank r`` writes. Exits 1 where more rank does not keep more, or full rank is not the tuned layers.
About five minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from three_tasks import BASE, Judge, cached, write_tasks

from veneer.adapters import Adapter
from veneer.adapters.adapter import check_name
from veneer.checkpoints import read_adapter
from veneer.cli.main import main as veneer
from veneer.compose.build import assemble
from veneer.data.batch import Order, make_batch
from veneer.data.dataset import load_examples
from veneer.data.render import Renderer
from veneer.evaluate.losses import compare, example_losses
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base

PAGE = Path(__file__).resolve().parents[1] / "extracting.md"
BEGIN, END = "<!-- table: docs/scripts/extracting.py -->", "<!-- end of the table -->"
TASK, STEPS, BATCH, RATE = "docstrings", 60, 8, 1e-4
RANKS = (1, 2, 4, 8, 16, 64, 256, 576)


def main() -> int:
    """Tune, extract, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/extracting"), help="folder of the tuned model and figures"
    )
    parser.add_argument("--only", choices=("tune", "extract"), help="do this part and stop")
    args = parser.parse_args()
    files = {TASK: write_tasks(args.work / "data")[TASK]}
    if not (args.work / "tuned").is_dir():
        tune(files[TASK]["train"], args.work / "tuned")
    if args.only == "tune":
        return 0
    for method in ("lora", "dora"):
        rank = str(max(RANKS)) if method == "lora" else "16"
        words = [
            "extract",
            "--base",
            BASE,
            "--tuned",
            str(args.work / "tuned"),
            "--rank",
            rank,
            "--method",
            method,
            "--json",
        ]
        if not (out := args.work / f"extracted-{method}").is_dir():
            with (args.work / f"{method}.json").open("w", encoding="utf-8") as file:
                sys.stdout, before = file, sys.stdout
                code = veneer([*words, "--out", str(out)])
                sys.stdout = before
            assert code == 0
    if args.only == "extract":
        return 0
    figures = args.work / "figures.json"
    return write_page(cached(figures, "curve", lambda: curve(args.work, files)))


def tune(rows: Path, out: Path) -> None:
    """Train every weight of the model, embeddings and norms too, with AdamW and a warm-up; save it as a folder."""
    base = load_base(BASE, dtype="float32")
    examples, _ = load_examples([rows], Renderer(base.tokenizer))
    runner, order = FlatRunner(base.model), Order(len(examples), 0)
    parameters = [p.requires_grad_(True) for p in base.model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        batch = make_batch([examples[order.at(step * BATCH + i)] for i in range(BATCH)], "tune")
        keep = batch.weights.nonzero().squeeze(1)
        logits = runner.logits(batch, keep)
        losses = torch.nn.functional.cross_entropy(logits.float(), batch.targets[keep], reduction="none")
        loss = (losses * batch.weights[keep]).sum() / batch.weights[keep].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 5)
        optimizer.step()
        optimizer.zero_grad()
        print(f"full fine-tuning, step {step + 1}/{STEPS}: loss {float(loss):.4f}", flush=True)
    base.model.save_pretrained(out)
    base.tokenizer.save_pretrained(out)


def cut(adapter: Adapter, rank: int) -> Adapter:
    """The leading ``rank`` directions at every site; extraction writes them largest first, each factor with the root of its size."""
    tensors = {
        site: {"lora_A": own["lora_A"].detach()[:rank].clone(), "lora_B": own["lora_B"].detach()[:, :rank].clone()}
        for site, own in adapter.tensors.items()
    }
    return assemble(tensors, adapter.kinds, check_name(f"rank-{rank}"))


def curve(work: Path, files: dict[str, Any]) -> dict[str, Any]:
    """Held-out loss of base, every rank and the full fine-tune."""
    judge = Judge(files, general=4)
    base = judge.losses(None)
    whole = read_adapter(work / "extracted-lora", "whole")
    report = json.loads((work / "lora.json").read_text(encoding="utf-8"))
    energies = [(site["norm"] ** 2, [value**2 for value in site["singular_values"]]) for site in report["sites"]]
    total = sum(norm for norm, _ in energies)
    rows, before = [], None
    for rank in RANKS:
        judge.bank.insert(part := cut(whole, rank))
        found = judge.whole(part.name)
        kept = sum(sum(values[:rank]) for _, values in energies) / total
        step = compare(found[TASK], before) if before is not None else None
        rows.append(
            {
                "rank": rank,
                "kept": kept,
                "parameters": part.num_parameters(),
                "loss": found[TASK].mean,
                "general": found["general"].mean,
            }
        )
        rows[-1]["step"] = None if step is None else [step.mean, step.low, step.high]
        before = found[TASK]
        judge.bank.remove(part.name)
        print(rows[-1], flush=True)
    judge.bank.load(work / "extracted-dora", name="dora")
    dora = json.loads((work / "dora.json").read_text(encoding="utf-8"))
    found = judge.whole("dora")
    rows.append(
        {
            "rank": "16, DoRA",
            "kept": dora["kept"],
            "parameters": dora["parameters"],
            "loss": found[TASK].mean,
            "general": found["general"].mean,
        }
    )
    tuned = load_base(work / "tuned", dtype="float32")
    runner = FlatRunner(tuned.model)
    full = {name: example_losses(runner, own).mean for name, own in judge.sets.items()}
    return {
        "base": base,
        "rows": rows,
        "full": full,
        "outside": report["outside_share"],
        "names": list(report["outside"])[:3],
    }


def write_page(figures: dict[str, Any]) -> int:
    """Put the table where the page has it, and say whether the curve falls."""
    rows = figures["rows"]
    lines = ["| rank | parameters | share of the change | held-out loss | general text |", "|---|---|---|---|---|"]
    lines.append(f"| base | | | {figures['base'][TASK]:.4f} | {figures['base']['general']:.4f} |")
    lines += [
        f"| {r['rank']} | {r['parameters']:,} | {r['kept']:.1%} | {r['loss']:.4f} | {r['general']:.4f} |" for r in rows
    ]
    lines.append(
        f"| full fine-tune | 134,515,008 | 100 % | {figures['full'][TASK]:.4f} | {figures['full']['general']:.4f} |"
    )
    lines += [
        "",
        f"Of the whole change {figures['outside']:.1%} (square norm) lies outside the linear layers: {', '.join(figures['names'])}.",
    ]
    table = "\n".join(lines)
    text = PAGE.read_text(encoding="utf-8")
    made = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text, flags=re.S)
    PAGE.write_text(made, encoding="utf-8")
    print(table)
    losses = [row["loss"] for row in rows if isinstance(row["rank"], int)]
    rising = [f"{a:.4f} -> {b:.4f}" for a, b in itertools.pairwise(losses) if b > a + 2e-3]
    print("the curve falls" if not rising else f"the curve rises: {', '.join(rising)}")
    return int(bool(rising))


if __name__ == "__main__":
    sys.exit(main())
