"""Labelled rows on the command line: examples for the heads of loaded adapters, and their predictions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer._terminal import counted, status
from veneer.cli._output import counting
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.cli._targets import LoadedTargets
    from veneer.data.example import Example
    from veneer.data.labels import Classes
    from veneer.data.rows.row import Row
    from veneer.evaluate.predictions import Predictions
    from veneer.models.flat import FlatRunner


def classes_of(loaded: LoadedTargets, name: str) -> Classes:
    """Return the classes of an adapter's head, by its receipt; numbers in place of names if it has none. Empty for numbers to predict."""
    from veneer.checkpoints.receipt import labels_of
    from veneer.data.labels import Classes

    if loaded.task == "regression":
        return Classes(())
    adapter = loaded.bank[name]
    head = next((site.name for site in loaded.bank.sites.values() if site.is_classifier), "")
    if "weight" not in adapter.overrides.get(head, {}):
        raise ConfigError(f"{name} has no head for classes; train it with --task classification")
    outputs = adapter.overrides[head]["weight"].shape[0]
    labels = labels_of(adapter)
    return Classes(labels if len(labels) == outputs else map(str, range(outputs)))


@status("reading the examples")
def read_labelled(
    loaded: LoadedTargets,
    file: str,
    classes: Classes,
    columns: dict[str, str],
    *,
    max_length: int | None = None,
    truncate: Literal["error", "end"] = "end",
    unlabelled: bool = False,
) -> tuple[list[Example], list[Row]]:
    """Read the rows of a file as examples, and the rows themselves. ``unlabelled``: rows need no label, and what they have is not read."""
    from veneer.data.chat.rendered import RenderOptions
    from veneer.data.dataset import load_examples
    from veneer.data.labelled import LABELLED_TASKS, LabelledRenderer
    from veneer.training.run.setup import context_of

    if loaded.base.tokenizer is None:
        raise ConfigError(
            f"{loaded.base.name} has no tokenizer to encode text; add the tokenizer's files to the folder"
        )
    assert loaded.task in LABELLED_TASKS
    length = min(context_of(loaded.base), max_length or context_of(loaded.base))
    renderer = LabelledRenderer(
        loaded.base.tokenizer, loaded.task, classes, RenderOptions(max_length=length), unlabelled=unlabelled
    )
    rows: list[Row] = []
    examples, report = load_examples(
        [file],
        renderer,
        format="labelled",
        columns=columns,
        truncate=truncate,
        on_row=lambda row, parts: rows.append(row),
    )
    if report.cut:
        print(f"{file}: {counted(report.cut, 'example')} truncated to {length:,} tokens", file=sys.stderr)
    return examples[:], rows


def predictions_of(
    loaded: LoadedTargets, runner: FlatRunner, name: str, examples: list[Example], what: str
) -> Predictions:
    """Run one adapter's head on the examples, with a line of progress."""
    from veneer.evaluate.predictions import predict

    with counting(f"{what} {name}", len(examples), "examples") as show:
        return predict(runner, examples, bank=loaded.bank, route=name, progress=show)


def score_all(loaded: LoadedTargets, file: str, columns: dict[str, str], args: Any) -> dict[str, dict[str, Any]]:
    """Return the loss and the scores of every adapter on a file of labelled rows."""
    from veneer.evaluate.scores import class_scores, number_scores
    from veneer.models.flat import FlatRunner

    runner = FlatRunner(loaded.base.model)
    report: dict[str, dict[str, Any]] = {}
    for name in loaded.names:
        examples, _ = read_labelled(loaded, file, classes_of(loaded, name), columns, max_length=args.max_length)
        found = predictions_of(loaded, runner, name, examples[: args.limit], "evaluating")
        if loaded.task == "regression":
            scores = number_scores(found.values_K.tolist(), found.targets_K.tolist())
        else:
            scores = class_scores(found.values_K.tolist(), found.targets_K.long().tolist())
        report[name] = {
            "examples": len(examples[: args.limit]),
            "loss": float(found.losses_K.mean()),
            "scores": {key: vars(score) for key, score in scores.items()},
        }
    return report


def score_lines(file: str, report: dict[str, dict[str, Any]]) -> list[str]:
    """Return the report as lines."""
    width = max(map(len, report))
    lines = []
    for name, entry in report.items():
        scores = "  ".join(
            f"{key} {score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f})"
            for key, score in entry["scores"].items()
        )
        lines.append(f"  {name:<{width}}  loss {entry['loss']:.4f}  {scores}")
    first = next(iter(report.values()))
    return [f"{file}: {counted(first['examples'], 'example')}; 95 % intervals over resampled examples", *lines]


def columns_of(loaded: LoadedTargets, name: str, found: Predictions, rows: int) -> dict[str, list[Any]]:
    """Return the columns that an adapter's predictions add to the rows: its prediction, and the probability of it."""
    if loaded.task == "regression":
        return {"prediction": [round(value, 6) for value in found.values_K.tolist()]}
    classes = classes_of(loaded, name).names
    predicted = [classes[number] for number in found.values_K.tolist()]
    sure = [round(value, 6) for value in found.probabilities_KL.max(1).values.tolist()]
    if loaded.task == "classification":
        return {"prediction": predicted, "probability": sure}
    by_row: dict[str, list[Any]] = {"prediction": [[] for _ in range(rows)], "probability": [[] for _ in range(rows)]}
    for owner, label, probability in zip(found.owner_K.tolist(), predicted, sure, strict=True):
        by_row["prediction"][owner].append(label)
        by_row["probability"][owner].append(probability)
    return by_row


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write columns as .jsonl, .csv or .parquet, by the name of the file."""
    import csv
    import io
    import json

    from veneer._files import replace_bytes, replace_text

    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigError("writing Parquet needs pyarrow; run: pip install 'veneer[parquet]'") from error
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), buffer)
        replace_bytes(path, buffer.getvalue())
    elif path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
        replace_text(path, text.getvalue())
    else:
        replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
