"""Rows of a parquet file, by batches; needs pyarrow, which is an extra."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.data.rows.row import Bad, Record
from veneer.errors import DataError

__all__ = ["parquet_rows"]

_BATCH = 1024


def parquet_rows(path: Path) -> Iterator[Record | Bad]:
    """Each row of a parquet file as a record; its place is "file:row N", counted from 1.

    Raises:
        DataError: pyarrow is not installed, or the file cannot be read.
    """
    parquet = _library(path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{path.name}:row {number}", values)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        after = f" after row {number}" if number else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{path}: the parquet file cannot be read{after}: {reason}.") from error


def _library(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading parquet needs pyarrow, which is not installed; run: pip install 'veneer[parquet]'."
        ) from error
    return pyarrow.parquet
