"""The jobs of a `veneer compare` again, as a script per job: transformers and PEFT in an ordinary padded loop.

    veneer compare train.jsonl --task classification ... --out runs/whole
    python -m bench.compare_beside_peft --data DIR --compare runs/whole --out runs/peft [--seeds 1] [--threads 2]
    python -m bench.compare_beside_peft --data DIR --compare runs/whole --out runs/peft --table

DIR holds train, valid and test files of text and label. Every job runs in a process of its own, as a user's script does: it loads the
base, trains for as many steps of 16 rows at the rate that the comparison chose, evaluates the held-out rows as often, and scores the test
rows at the best and at the last step. Full fine-tuning and BitFit are plain transformers. PEFT has no bottleneck adapters.

Recorded for each job: seconds of the clock and of the CPU of the whole process, and accuracy. A job that is recorded is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from evidence.records import Records, machine, markdown

BATCH, EVALUATIONS = 16, 4
LINEARS, HEAD = ["query", "key", "value", "intermediate.dense", "output.dense"], ["pooler", "classifier"]


def main() -> None:
    """Run the missing jobs, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--compare", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--table", action="store_true", help="print the table of the finished jobs")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(train_and_score(args, json.loads(args.job))))
        return
    records = Records(args.out / "results.jsonl")
    rows = json.loads((args.compare / "compare.json").read_text(encoding="utf-8"))["rows"]
    for row in () if args.table else rows:
        for seed in range(args.seeds):
            job = {"method": row["method"], "r": row["r"], "rate": row["learning_rate"], "seed": seed}
            key = f"{row['method']} seed {seed} threads {args.threads}"
            if key not in records and row["method"] in MODELS:
                records.add(key, **in_a_process(args, job), method=row["method"], machine=machine())
    print(table(records, rows))


def in_a_process(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """The scores of a job, and the seconds of its process."""
    words = [
        sys.executable,
        "-m",
        "bench.compare_beside_peft",
        "--data",
        str(args.data),
        "--compare",
        str(args.compare),
    ]
    words += [
        "--out",
        str(args.out),
        "--threads",
        str(args.threads),
        "--steps",
        str(args.steps),
        "--job",
        json.dumps(job),
    ]
    used, start = children(), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    seconds = {"wall": time.perf_counter() - start, "cpu": children() - used}
    return {**json.loads(found.stdout.splitlines()[-1]), **{key: round(value, 1) for key, value in seconds.items()}}


def children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def full(model: Any, r: int | None) -> Any:
    for name, parameter in model.bert.named_parameters():  # as in the comparison: the linear layers
        parameter.requires_grad_("embeddings" not in name and "LayerNorm" not in name)
    return model


def bitfit(model: Any, r: int | None) -> Any:
    for name, parameter in model.bert.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or "pooler" in name)
    return model


def peft_model(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, config)


def lora(model: Any, r: int | None, **options: Any) -> Any:
    from peft import LoraConfig

    config = {"task_type": "SEQ_CLS", "r": r, "lora_alpha": 32, "target_modules": LINEARS, "modules_to_save": HEAD}
    return peft_model(model, LoraConfig(**config, **options))


def dora(model: Any, r: int | None) -> Any:
    return lora(model, r, use_dora=True)


def ia3(model: Any, r: int | None) -> Any:
    from peft import IA3Config

    out = r".*layer\.\d+\.output\.dense"
    where = {"target_modules": rf".*\.(key|value)|{out}", "feedforward_modules": out}
    return peft_model(model, IA3Config(task_type="SEQ_CLS", modules_to_save=HEAD, **where))


def prefix(model: Any, r: int | None) -> Any:
    from peft import PrefixTuningConfig

    return peft_model(model, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20))


MODELS = {"full": full, "bitfit": bitfit, "lora": lora, "dora": dora, "ia3": ia3, "prefix": prefix}


def train_and_score(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Train, in this process."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from veneer.models.embedded import find_embedded

    torch.set_num_threads(args.threads)
    torch.manual_seed(job["seed"])
    folder = find_embedded("minilm-l6")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = {split: rows_of(next(args.data.glob(f"{split}.*")), tokenizer) for split in ("train", "valid", "test")}
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = MODELS[job["method"]](model, job["r"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, max(0.0, (args.steps - step) / max(1, args.steps - 10)))
    )
    collate = collator(tokenizer)
    order = torch.utils.data.DataLoader(data["train"], BATCH, shuffle=True, collate_fn=collate)
    best, held, seconds, step = None, float("inf"), [], 0
    while step < args.steps:
        for batch in order:
            start = time.process_time()
            model.train()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            warm.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - start)
            step += 1
            if step % -(-args.steps // EVALUATIONS) == 0 or step == args.steps:
                loss, _ = evaluate(model, data["valid"], collate)
                if loss < held:
                    held = loss
                    best = [parameter.detach().clone() for parameter in trained]
            if step == args.steps:
                break
    last = evaluate(model, data["test"], collate)
    with torch.no_grad():
        for parameter, value in zip(trained, best or (), strict=True):
            parameter.copy_(value)
    found = evaluate(model, data["test"], collate)
    return {
        "accuracy": found[1],
        "loss": found[0],
        "accuracy_last": last[1],
        "held_out": held,
        "trained": sum(parameter.numel() for parameter in trained),
        "step_cpu": statistics.median(seconds),
    }


def rows_of(file: Path, tokenizer: Any) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    classes = sorted({row["label"] for row in rows})
    return [{**tokenizer(row["text"]), "labels": classes.index(row["label"])} for row in rows]


def collator(tokenizer: Any) -> Any:
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


def evaluate(model: Any, rows: list[dict[str, Any]], collate: Any) -> tuple[float, float]:
    """(mean loss, accuracy)."""
    import torch

    model.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for batch in torch.utils.data.DataLoader(rows, 2 * BATCH, collate_fn=collate):
            found = model(**batch)
            loss += float(found.loss) * len(batch["labels"])
            right += int((found.logits.argmax(-1) == batch["labels"]).sum())
    return loss / len(rows), right / len(rows)


def table(records: Records, rows: list[dict[str, Any]]) -> str:
    """The jobs of each method, and the comparison's accuracy beside them."""
    ours = {row["method"]: row["scores_best"]["accuracy"]["mean"] for row in rows}
    lines = []
    for method in MODELS:
        jobs = [one for one in records.known.values() if one["method"] == method]
        if jobs:
            figures = [statistics.fmean(one[key] for one in jobs) for key in ("cpu", "wall", "step_cpu", "accuracy")]
            cells = [f"{figures[0]:.0f} s", f"{figures[1]:.0f} s", f"{figures[2]:.2f} s", f"{figures[3]:.3f}"]
            lines.append([method, str(len(jobs)), *cells, f"{ours.get(method, float('nan')):.3f}"])
    header = ["method", "jobs", "CPU a job", "clock a job", "CPU a step", "accuracy", "accuracy in the comparison"]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
