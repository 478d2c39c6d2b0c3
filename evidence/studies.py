"""Claims of the papers that are comparisons of methods on one data set; each study is ``veneer compare``, which resumes.

    python -m evidence.studies ranks --data DIR --out runs/evidence/ranks

DIR holds train, valid and test files. Every contestant's learning rate is searched on the held-out rows with the first seed; the winners
are trained with every seed and scored on the test rows.

    generation    full fine-tuning, its last layers, bottlenecks, prefix, LoRA and DoRA on one text set (LoRA, Table 3)
    ranks         LoRA at ranks 1 to 64, and one budget of parameters on other weights (LoRA, Tables 5, 6 and 18)
    layers        attention against the feed-forward at equal parameters; the best rate of each rank (LoRA Without Regret)
    dora          DoRA against LoRA at ranks 4, 8 and 16 (DoRA, Table 1)
    data          LoRA, IA3 and full fine-tuning with 100 and 1,000 rows (LoRA, Table 16)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from evidence.classification import some
from evidence.records import machine, markdown
from veneer.config import TrainOptions
from veneer.training.compare import compare
from veneer.training.compare.report import cells, header, write_html

QV, FEED_FORWARD = ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
Jobs = list[dict[str, Any]]
STUDIES: dict[str, Jobs] = {
    "generation": [
        {"name": "full", "method": "full"},
        {"name": "full, last two blocks", "method": "full", "layers_to_transform": [28, 29]},
        {"name": "Houlsby", "method": "houlsby", "bottleneck_size": 16},
        {"name": "prefix", "method": "prefix", "num_virtual_tokens": 16},
        {"name": "LoRA q,v r=4", "r": 4, "target_modules": QV},
        {"name": "LoRA r=8", "r": 8},
        {"name": "DoRA r=8", "method": "dora", "r": 8},
    ],
    "ranks": [
        *({"name": f"q,v r={r}", "r": r, "lora_alpha": 2.0 * r, "target_modules": QV} for r in (1, 2, 4, 8, 64)),
        {"name": "q r=8", "r": 8, "target_modules": ["q_proj"]},
        {"name": "v r=8", "r": 8, "target_modules": ["v_proj"]},
        {"name": "q,k,v,o r=2", "r": 2, "lora_alpha": 4.0, "target_modules": ATTENTION},
    ],
    "layers": [
        *({"name": f"all r={r}", "r": r} for r in (1, 4, 16, 64)),
        {"name": "attention r=26", "r": 26, "target_modules": ATTENTION},
        {"name": "feed-forward r=16", "r": 16, "target_modules": FEED_FORWARD},
    ],
    "dora": [
        {"name": f"{method} r={r}", "method": method, "r": r, "lora_alpha": 2.0 * r}
        for r in (4, 8, 16)
        for method in ("lora", "dora")
    ],
    "data": [{"name": "LoRA r=8", "r": 8}, {"name": "IA3", "method": "ia3"}, {"name": "full", "method": "full"}],
}
"""Contestants by study. The names of layers are those of Llama. In smollm2-135m, r=26 on the attention is 99,840 parameters a block, and
r=16 on the feed-forward 101,376."""
ROWS = {"data": (100, 1000)}
"""Numbers of training rows, for a study that has several; others take all."""


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--task", default="sft", choices=("sft", "classification"))
    parser.add_argument("--columns", default="", metavar="NAME=COLUMN", help="rename columns: prompt=mr,completion=ref")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, default=500, help="most held-out rows, and most test rows, evenly chosen")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = {split: next(args.data.glob(f"{split}.*")) for split in ("train", "valid", "test")}
    for count in ROWS.get(args.study, (None,)):
        out = args.out if count is None else args.out / f"{count}-rows"
        given = {split: some(files[split], args.limit, out / "rows", split) for split in ("valid", "test")}
        train = files["train"] if count is None else some(files["train"], count, out / "rows", "train")
        options = TrainOptions(
            task=args.task,
            base=args.base,
            dtype="float32",
            threads=1,
            data=(train,),
            valid=(given["valid"],),
            columns=dict(part.split("=", 1) for part in args.columns.split(",") if part),
            out=out,
            jobs=tuple(STUDIES[args.study]),
            steps=args.steps,
            batch_size=args.batch_size,
            plan=False,
        )
        result = compare(options, given["test"], seeds=list(range(args.seeds)))
        write_html(result)
        rows = "" if count is None else f"{count} training rows, "
        print(f"\n{args.study}: {rows}{args.steps} steps of {args.batch_size}, {args.seeds} seeds; {machine()}\n")
        print(markdown(list(header(result)), cells(result)))
        print("\n".join(f"best rate of {row.label}: {row.learning_rate:.1e}" for row in result.rows), flush=True)


if __name__ == "__main__":
    main()
