"""``veneer predict FILE --adapter RUN --out OUT``: predict the labels of a file of rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from veneer._terminal import counted
from veneer.cli._parser import add_device, add_dtype, add_force, add_quantize, at_least
from veneer.cli._row_arguments import pairs_of
from veneer.cli._targets import load_targets
from veneer.errors import ConfigError

_KINDS = (".jsonl", ".csv", ".parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "file", metavar="FILE", help="rows with a text, or with text and text_pair; labels are not needed"
    )
    parser.add_argument(
        "--adapter",
        dest="target",
        action="append",
        required=True,
        metavar="TARGET",
        help="a run or an adapter folder with a head; repeat for several",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write: .jsonl, .csv or .parquet")
    parser.add_argument("--base", metavar="MODEL", help="base model (default: the one named in the adapter folder)")
    parser.add_argument("--max-length", type=at_least(2), metavar="N", help="truncate longer texts to N tokens")
    parser.add_argument(
        "--columns", metavar="NAME=COLUMN", default="", help="rename columns: text=sentence1,text_pair=sentence2"
    )
    add_force(parser)
    add_dtype(parser)
    add_device(parser)
    add_quantize(parser)


def run(args: argparse.Namespace) -> int:
    """Write the texts with the predictions of every adapter."""
    out = Path(args.out)
    if out.suffix not in _KINDS:
        raise ConfigError(f"--out {out}: expected a name that ends with {', '.join(_KINDS)}")
    from veneer.cli._labelled import classes_of, columns_of, predictions_of, read_labelled, write_table
    from veneer.data.labelled import LABELLED_TASKS
    from veneer.models.flat import FlatRunner

    loaded = load_targets(args, purpose="train")
    if loaded.task not in LABELLED_TASKS:
        raise ConfigError(
            f"{', '.join(loaded.names) or args.target[0]} has no head to predict labels with; train one with --task classification, or "
            "write answers with veneer generate"
        )
    columns: dict[str, list[object]] = {}
    runner = FlatRunner(loaded.base.model)
    for name in loaded.names:
        examples, rows = read_labelled(
            loaded,
            args.file,
            classes_of(loaded, name),
            pairs_of("--columns", args.columns),
            max_length=args.max_length,
            unlabelled=True,
        )
        if not columns:
            columns["text"] = [list(row.words) or row.text for row in rows]
            if any(row.second for row in rows):
                columns["text_pair"] = [row.second for row in rows]
        found = predictions_of(loaded, runner, name, examples, "predicting with")
        prefix = f"{name}." if len(loaded.names) > 1 else ""
        columns |= {f"{prefix}{key}": values for key, values in columns_of(loaded, name, found, len(rows)).items()}
    write_table(out, columns)
    print(
        f"wrote {counted(len(columns['text']), 'row')} with {', '.join(key for key in columns if 'prediction' in key)} to {out}"
    )
    return 0
