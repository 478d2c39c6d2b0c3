"""Rows that are in memory (lists of mappings, data sets, data frames), written as a file, since a run reads its examples again to resume.

The file is named after its content, so that other rows never replace those of a run. Messages name its rows as Python does: data[16].
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from veneer._files import replace_text
from veneer.data.rows.hub_sets import hub_set
from veneer.errors import DataError

FOLDER = "data"
"""The folder of a run that rows are written into."""

_WRITTEN = re.compile(r"(\w+)-[0-9a-f]{12}\.jsonl")


def title_of(path: Path) -> str:
    """The name of a file in messages: the argument whose rows `write_rows` wrote into it, a data set of the hub, or its own."""
    return _argument_of(path) or str(hub_set(path) or path.name)


def source_of(path: Path, number: int) -> str:
    """The source of the ``number``-th line of a file, counted from 1: rows.jsonl:17, or data[16]."""
    argument = _argument_of(path)
    return f"{argument}[{number - 1}]" if argument else f"{path.name}:{number}"


def _argument_of(path: Path) -> str | None:
    found = _WRITTEN.fullmatch(path.name)
    return found[1] if found and path.parent.name == FOLDER else None


def rows_in(value: Any, what: str) -> list[Mapping[str, Any]] | None:
    """The rows of a list, a ``datasets.Dataset`` or a data frame; None for paths.

    Raises:
        DataError: something that holds no rows.
    """
    if value is None or isinstance(value, str | Path):
        return None
    if hasattr(value, "to_dict") and hasattr(value, "iterrows"):
        present = value.notna().to_dict("records")  # a missing cell of a frame is NaN, which is not a value of the row
        cells = zip(value.to_dict("records"), present, strict=True)
        value = [{key: cell for key, cell in row.items() if has[key]} for row, has in cells]
    if isinstance(value, Mapping):
        raise DataError(
            f"{what}: expected rows or paths, found a mapping with {', '.join(map(str, value))}; give one of its values"
        )
    if not isinstance(value, Iterable):
        raise DataError(
            f"{what}: expected a path, paths, or rows such as a list of mappings; found {type(value).__name__}"
        )
    entries = list(value)
    if all(isinstance(entry, str | Path) for entry in entries):
        return None
    wrong = next((i for i, entry in enumerate(entries) if not isinstance(entry, Mapping)), None)
    if wrong is not None:
        raise DataError(
            f'{what}[{wrong}]: expected a row such as {{"prompt": ..., "completion": ...}}, found {type(entries[wrong]).__name__}'
        )
    return entries


def write_rows(rows: Iterable[Mapping[str, Any]], run: Path, what: str) -> Path:
    """Write the rows of the argument ``what`` into a run's folder as JSON lines; returns the file.

    Raises:
        DataError: a row holds something that JSON cannot.
    """
    lines = []
    for number, row in enumerate(rows):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False, default=_listed) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(f"{what}[{number}]: the row cannot be written as JSON: {error}") from None
    text = "".join(lines)
    path = run / FOLDER / f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    return path


def _listed(value: Any) -> Any:
    """An array of numpy, as a frame from a Parquet file has them in place of lists, as a list; a number of numpy as a number."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
