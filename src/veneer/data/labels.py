"""Labels of rows: the classes of a data set by name, or numbers to predict.

names = label_names(reader)          ("negative", "positive"): sorted, numbers by their value
Classes(names).number(row.label)     0 or 1
number_of(row.label)                 3.8, for regression
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from veneer.data.rows.json_rows import describe
from veneer.data.rows.row import BadRow, Row
from veneer.errors import DataError, listed

__all__ = ["Classes", "class_name", "label_names", "number_of"]

MOST_CLASSES = 1000
_SHOWN = 8


class Classes:
    """The classes of a task, each with a number."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def number(self, label: Any) -> int:
        """The number of a row's label.

        Raises DataError for a label that is not a name, or that no training row has.
        """
        name = class_name(label)
        found = self._numbers.get(name)
        if found is None:
            raise DataError(f"{name!r} is not a label of the training rows, which have {self}")
        return found

    def __str__(self) -> str:
        return listed(self.names, _SHOWN)


def class_name(label: Any) -> str:
    """A label as the name of a class: text, a whole number, or true and false.

    Raises DataError for anything else.
    """
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():  # a column of whole numbers with a gap, as data frames write it
        return str(int(label))
    if isinstance(label, int):
        return str(label)
    if isinstance(label, str) and label.strip():
        return label.strip()
    if label is None or label == "":
        raise DataError("missing; every row needs a label")
    raise DataError(
        f"expected the name of a class, found {describe(label)}; for numbers to predict use task: regression"
    )


def number_of(label: Any) -> float:
    """A label as a finite number.

    Raises DataError for anything else.
    """
    if label is None or label == "":
        raise DataError("missing; every row needs a number")
    try:
        value = float(label) if isinstance(label, (int, float, str)) and not isinstance(label, bool) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"expected a number to predict, found {describe(label)}; for names of classes use task: classification"
        )
    return value


def label_names(rows: Iterable[Row | BadRow], source: str) -> tuple[str, ...]:
    """The names of all classes in the rows; lists of labels count one by one. Rows without a usable label are passed over.

    Raises DataError for fewer than two classes, or for more than ``MOST_CLASSES``. ``source``: the files, for the message.
    """
    found: set[str] = set()
    for row in rows:
        if isinstance(row, BadRow):
            continue
        for label in row.label if isinstance(row.label, list) else (row.label,):
            try:
                found.add(class_name(label))
            except DataError:
                continue  # reported with the row
        if len(found) > MOST_CLASSES:
            raise DataError(
                f"{source}: the column label has more than {MOST_CLASSES:,} different values, so they are not classes; for numbers to "
                "predict use task: regression"
            )
    if len(found) == 1:
        raise DataError(
            f"{source}: every row has the label {next(iter(found))!r}; a classifier needs examples of two classes or more"
        )
    return tuple(sorted(found, key=_order))


def _order(name: str) -> tuple[int, float, str]:
    try:
        return (0, float(int(name)), name)
    except ValueError:
        return (1, 0.0, name)
