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

Jobs = list[dict[str, Any]]
NAMES: dict[str, dict[str, Any]] = {
    "sft": {
        "q": ["q_proj"],
        "v": ["v_proj"],
        "q,v": ["q_proj", "v_proj"],
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "feed-forward": ["gate_proj", "up_proj", "down_proj"],
        "last blocks": [28, 29],
        "attention rank": 26,
    },
    "classification": {
        "q": ["query"],
        "v": ["value"],
        "q,v": ["query", "value"],
        "attention": ["query", "key", "value", r"re:.*attention\.output\.dense"],
        "feed-forward": ["intermediate.dense", r"re:.*layer\.\d+\.output\.dense"],
        "last blocks": [4, 5],
        "attention rank": 20,
    },
}
"""Names of layers by task: those of Llama (smollm2-135m, 30 blocks) and of BERT (minilm-l6, 6 blocks). At its rank the attention has as
many parameters as the feed-forward at 16: 99,840 against 101,376 a block of smollm2-135m, and 61,440 both in minilm-l6."""


def study(name: str, task: str) -> Jobs:
    """The contestants of a study."""
    names = NAMES[task]
    attention, rank = names["attention"], names["attention rank"]
    studies: dict[str, Jobs] = {
        "generation": [
            {"name": "full", "method": "full"},
            {"name": "full, last two blocks", "method": "full", "layers_to_transform": names["last blocks"]},
            {"name": "Houlsby", "method": "houlsby", "bottleneck_size": 16},
            {"name": "prefix", "method": "prefix", "num_virtual_tokens": 16},
            {"name": "LoRA q,v r=4", "r": 4, "target_modules": names["q,v"]},
            {"name": "LoRA r=8", "r": 8},
            {"name": "DoRA r=8", "method": "dora", "r": 8},
        ],
        "ranks": [
            *(
                {"name": f"q,v r={r}", "r": r, "lora_alpha": 2.0 * r, "target_modules": names["q,v"]}
                for r in (1, 2, 4, 8, 64)
            ),
            {"name": "q r=8", "r": 8, "target_modules": names["q"]},
            {"name": "v r=8", "r": 8, "target_modules": names["v"]},
            {"name": "q,k,v,o r=2", "r": 2, "lora_alpha": 4.0, "target_modules": attention},
        ],
        "layers": [
            *({"name": f"all r={r}", "r": r} for r in (1, 4, 16, 64)),
            {"name": f"attention r={rank}", "r": rank, "target_modules": attention},
            {"name": "feed-forward r=16", "r": 16, "target_modules": names["feed-forward"]},
        ],
        "dora": [
            {"name": f"{method} r={r}", "method": method, "r": r, "lora_alpha": 2.0 * r}
            for r in (4, 8, 16)
            for method in ("lora", "dora")
        ],
        "data": [{"name": "LoRA r=8", "r": 8}, {"name": "IA3", "method": "ia3"}, {"name": "full", "method": "full"}],
    }
    return studies[name]


STUDIES = ("generation", "ranks", "layers", "dora", "data")
ROWS = {"data": (100, 1000)}
"""Numbers of training rows, for a study that has several; others take all."""


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", help="default: smollm2-135m, or minilm-l6 for classification")
    parser.add_argument("--task", default="sft", choices=("sft", "classification"))
    parser.add_argument("--columns", default="", metavar="NAME=COLUMN", help="rename columns: prompt=mr,completion=ref")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, default=500, help="most held-out rows, and most test rows, evenly chosen")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--contestants", nargs="+", help="names of contestants (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = {split: next(args.data.glob(f"{split}.*")) for split in ("train", "valid", "test")}
    jobs = study(args.study, args.task)
    chosen = [one for one in jobs if args.contestants is None or one["name"] in args.contestants]
    for count in ROWS.get(args.study, (None,)):
        out = args.out if count is None else args.out / f"{count}-rows"
        given = {split: some(files[split], args.limit, out / "rows", split) for split in ("valid", "test")}
        train = files["train"] if count is None else some(files["train"], count, out / "rows", "train")
        options = TrainOptions(
            task=args.task,
            base=args.base or ("minilm-l6" if args.task == "classification" else "smollm2-135m"),
            dtype=args.dtype,
            threads=1,
            data=(train,),
            valid=(given["valid"],),
            columns=dict(part.split("=", 1) for part in args.columns.split(",") if part),
            out=out,
            jobs=tuple(chosen),
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
