"""Methods on sentence classification with a small encoder: the table of the LoRA paper in small (arXiv 2106.09685, Table 2).

    python -m evidence.classification --data sst2=DIR --data cola=DIR --out runs/evidence/classification

DIR holds train, valid and test files of rows with text and label. Every method's learning rate is searched on the held-out rows with the
first seed; the winners are trained with every seed and scored on the test rows, at the best and at the last step. The head is trained with
every method and counted apart; "head only" trains nothing else. This is ``veneer compare``, which resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from evidence.records import machine, markdown
from veneer.config import TrainOptions
from veneer.data.rows.memory_rows import write_rows
from veneer.data.rows.readers import RecordReader
from veneer.data.rows.row import Record
from veneer.training.compare import compare
from veneer.training.compare.report import cells, header, write_html

QV = ("query", "value")
METHODS: list[dict[str, Any]] = [
    {"name": "head only", "method": "full", "target_modules": ["pooler.dense"]},
    {"name": "full fine-tuning", "method": "full"},
    {"name": "BitFit", "method": "bitfit"},
    {"name": "Houlsby", "method": "houlsby", "bottleneck_size": 16},
    {"name": "Pfeiffer", "method": "pfeiffer", "bottleneck_size": 32},
    {"name": "prefix", "method": "prefix", "num_virtual_tokens": 16},
    {"name": "prompt", "method": "prompt", "num_virtual_tokens": 16},
    {"name": "LoRA q,v r=8", "method": "lora", "r": 8, "target_modules": list(QV)},
    {"name": "LoRA all r=8", "method": "lora", "r": 8},
    {"name": "DoRA all r=8", "method": "dora", "r": 8},
]


def main() -> None:
    """Compare the methods on each data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="minilm-l6", help="an encoder")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, default=500, help="most held-out rows, and most test rows, evenly chosen")
    parser.add_argument("--methods", nargs="+", help="names of methods (default: all)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [one for one in METHODS if args.methods is None or one["name"] in args.methods]
    for name, folder in (part.split("=", 1) for part in args.data):
        files = {split: next(Path(folder).glob(f"{split}.*")) for split in ("train", "valid", "test")}
        for split in ("valid", "test"):
            files[split] = some(files[split], args.limit, args.out / name / "rows", split)
        options = TrainOptions(
            task="classification",
            base=args.base,
            dtype=args.dtype,
            threads=1,
            data=(files["train"],),
            valid=(files["valid"],),
            out=args.out / name,
            jobs=tuple(chosen),
            steps=args.steps,
            eval_every=max(1, args.steps // 2),
            batch_size=args.batch_size,
            schedule="linear",
            plan=False,
        )
        result = compare(options, files["test"], seeds=list(range(args.seeds)))
        write_html(result)
        print(
            f"\n{name}: {result.examples['test']} test rows, {args.steps} steps of {args.batch_size}, {args.seeds} seeds; {machine()}\n"
        )
        print(markdown(list(header(result)), cells(result)), flush=True)


def some(file: Path, most: int, folder: Path, split: str) -> Path:
    """A file of at most so many rows of another one, evenly chosen."""
    rows = [record.values for record in RecordReader(file) if isinstance(record, Record)]
    return write_rows(rows[:: -(-len(rows) // most)], folder, split)


if __name__ == "__main__":
    main()
