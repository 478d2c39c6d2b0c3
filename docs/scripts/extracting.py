"""Make the table of docs/extracting.md: a full fine-tune of the embedded model, and adapters extracted from it.

    python docs/scripts/extracting.py --work runs/extracting

Every weight of the model is trained on docstrings; then an adapter of each rank is extracted and evaluated on held-out rows
beside the full fine-tune. The adapter of rank r is the leading part of that of full rank: at each layer the best approximation of rank r,
which is what ``veneer extract --rank r`` writes. Exits 1 if a rank is worse than the one before by more than its interval, or full rank
is not the tuned layers. About ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from three_tasks import BASE, Evaluator, cached, write_tasks

from veneer.adapters import Adapter
from veneer.adapters.adapter import check_name
from veneer.checkpoints import read_adapter
from veneer.cli.main import main as veneer
from veneer.data.batch import Order, make_batch
from veneer.data.chat.render import Renderer
from veneer.data.dataset import load_examples
from veneer.deltas.build import assemble
from veneer.evaluate.losses import compare, example_losses
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base

PAGE = Path(__file__).resolve().parents[1] / "extracting.md"
BEGIN, END = "<!-- table: docs/scripts/extracting.py -->", "<!-- end of the table -->"
TASK, STEPS, BATCH, RATE = "docstrings", 60, 8, 1e-4
RANKS = (1, 2, 4, 8, 16, 64, 256, 576)


def main() -> int:
    """Tune, extract, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/extracting"), help="folder of the tuned model and results"
    )
    parser.add_argument("--only", choices=("tune", "extract"), help="run only this part")
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
    results = args.work / "figures.json"
    return write_page(cached(results, "curve", lambda: curve(args.work, files)))


def tune(rows: Path, out: Path) -> None:
    """Train every weight of the model, embeddings and norms too, with AdamW, a warm-up and a learning rate that falls to zero; save it.

    At a rate that stays where it is, what the last steps leave is noise of every rank, which an extraction of a low rank leaves out: then
    the adapter is better than the fine-tune that it comes from.
    """
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
            group["lr"] = RATE * min((step + 1) / 5, (STEPS - step) / (STEPS - 5))
        optimizer.step()
        optimizer.zero_grad()
        print(f"full fine-tuning, step {step + 1}/{STEPS}: loss {loss.item():.4f}", flush=True)
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
    """Held-out loss of the base, every rank and the full fine-tune."""
    evaluator = Evaluator(files, general=4)
    base = evaluator.losses(None)
    whole = read_adapter(work / "extracted-lora", "whole")
    report = json.loads((work / "lora.json").read_text(encoding="utf-8"))
    energies = [(site["norm"] ** 2, [value**2 for value in site["singular_values"]]) for site in report["sites"]]
    total = sum(norm for norm, _ in energies)
    rows, before = [], None
    for rank in RANKS:
        evaluator.bank.insert(part := cut(whole, rank))
        found = evaluator.whole(part.name)
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
        evaluator.bank.remove(part.name)
        print(rows[-1], flush=True)
    evaluator.bank.load(work / "extracted-dora", name="dora")
    dora = json.loads((work / "dora.json").read_text(encoding="utf-8"))
    found = evaluator.whole("dora")
    rows.append(
        {
            "rank": "16, DoRA",
            "kept": dora["kept"],
            "parameters": dora["parameters"],
            "loss": found[TASK].mean,
            "general": found["general"].mean,
            "step": None,
        }
    )
    tuned = load_base(work / "tuned", dtype="float32").model
    full = losses_of(tuned, evaluator)
    with torch.no_grad():
        known = dict(evaluator.base.model.named_parameters())
        for name in report["outside"]:
            tuned.get_parameter(name).copy_(known[name])
    return {
        "base": base,
        "rows": rows,
        "full": full,
        "layers": losses_of(tuned, evaluator),
        "outside": report["outside_share"],
        "names": list(report["outside"])[:3],
    }


def losses_of(model: torch.nn.Module, evaluator: Evaluator) -> dict[str, float]:
    """Held-out losses of a model without an adapter."""
    runner = FlatRunner(model)
    with torch.no_grad():
        return {name: example_losses(runner, own).mean for name, own in evaluator.sets.items()}


def write_page(results: dict[str, Any]) -> int:
    """Write the table into the page. Returns whether the loss falls with the rank."""
    rows = results["rows"]
    lines = [
        "| rank | parameters | share of the change | held-out loss | against the rank before | general text |",
        "|---|---|---|---|---|---|",
    ]
    base, layers, full = results["base"], results["layers"], results["full"]
    lines.append(f"| base | | | {base[TASK]:.4f} | | {base['general']:.4f} |")
    for row in rows:
        apart = "" if row["step"] is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["step"])
        lines.append(
            f"| {row['rank']} | {row['parameters']:,} | {row['kept']:.1%} | {row['loss']:.4f} | {apart} | {row['general']:.4f} |"
        )
    lines += [
        f"| tuned, linear layers alone | 106,168,320 | 100 % | {layers[TASK]:.4f} | | {layers['general']:.4f} |",
        f"| full fine-tune | 134,515,008 | | {full[TASK]:.4f} | | {full['general']:.4f} |",
        "",
        f"Of the whole change {results['outside']:.1%} (square norm) lies outside the linear layers: {', '.join(results['names'])}.",
    ]
    table = "\n".join(lines)
    text = PAGE.read_text(encoding="utf-8")
    made = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text, flags=re.S)
    PAGE.write_text(made, encoding="utf-8")
    print(table)
    worse = [f"{row['rank']}: {row['step']}" for row in rows if row["step"] is not None and row["step"][1] > 0]
    apart = abs(rows[len(RANKS) - 1]["loss"] - layers[TASK])
    print("no rank is worse than the one before" if not worse else f"worse than the rank before: {', '.join(worse)}")
    print(f"full rank and the tuned layers differ by {apart:.1e}")
    return int(bool(worse) or apart > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
