"""``Options``: what every set of options descends from, and how its mistakes are told.

An option is one field with a type, a default and a docstring. Everything else derives from that: flags, YAML, JSON
Schema, the saved configuration and the documentation.

Numbers are strict: ``true`` is not 1 and "16" is not 16. Use the types below rather than plain ``int``, ``float`` and
``bool``; a test holds it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError

from veneer._options.document import Keys, shorten
from veneer.errors import ConfigError, Problems

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

Flag = StrictBool
Count = Annotated[int, Field(strict=True, ge=1)]
"""A whole number of things, at least one."""
Whole = Annotated[int, Field(strict=True, ge=0)]
"""A whole number, zero included."""
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
NotNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
Fraction = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1)]
"""At least 0, less than 1."""

Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""A list of words; a single one may stand without brackets."""
Paths = Annotated[tuple[Path, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str | Path) else value)]
"""A list of files; a single one may stand without brackets."""

Where = Callable[[Keys], str]
"""Says where the value at these keys was written."""


class _OptionsType(ModelMetaclass):
    """Makes a mistake in ``TrainOptions(...)`` an error of our own tree, without touching how pydantic nests models."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            assert issubclass(cls, BaseModel)
            problems = describe(error, cls, values)
            headline = f"{cls.__name__} cannot be made"
        problems.raise_if_any(ConfigError, headline)


class Options(BaseModel, metaclass=_OptionsType):
    """A frozen set of options. Unknown names are errors; each field's docstring is its description everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


_SYNONYMS = {
    "alpha": "lora_alpha",
    "dataset": "data",
    "dropout": "lora_dropout",
    "gradient_checkpointing": "activation_checkpointing",
    "lr": "learning_rate",
    "max_grad_norm": "clip",
    "max_seq_length": "max_length",
    "max_steps": "steps",
    "model": "base",
    "model_name_or_path": "base",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "output": "out",
    "output_dir": "out",
    "rank": "r",
    "train": "data",
    "validation": "valid",
    "warmup": "warmup_steps",
}
"""What other tools call an option of ours that is spelt quite differently."""


def near_miss(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for a word that is close to a known one or means the same, else nothing."""
    folded = {name.lower().strip("-").replace("-", "_"): name for name in known}
    key = word.lower().replace("-", "_").strip("_")
    if _SYNONYMS.get(key) in folded:
        return f"; did you mean {folded[_SYNONYMS[key]]}?"
    close = difflib.get_close_matches(key, folded, n=1, cutoff=0.6)
    return f"; did you mean {folded[close[0]]}?" if close else ""


_WORDS = {
    "integer": "whole number",
    "string": "text",
    "boolean": "true or false",
    "tuple": "list",
    "dictionary": "mapping",
    "Input is not a path for <class 'pathlib.Path'>": "a path",
}
"""Pydantic's names of types, and those that users of YAML know."""


def describe(
    error: ValidationError, model_cls: type[BaseModel], values: Mapping[str, Any], where: Where | None = None
) -> Problems:
    """The problems of a pydantic error in our words, one for each key, in the order of declaration."""
    expected: dict[Keys, list[str]] = {}
    for detail in error.errors(include_url=False):
        keys, found = _walk(detail["loc"], values, missing=detail["type"] == "missing")
        expected.setdefault(keys, [])
        text = _expectation(detail, keys, model_cls, found)
        if text not in expected[keys]:
            expected[keys].append(text)
    problems = Problems()
    for keys, texts in expected.items():
        name = ".".join(map(str, keys))
        # A rule over several options names the one that it begins with.
        about = keys or tuple(word for word in texts[0].split()[:1] if word in values)
        place = where(about) if where else ""
        problems.add(": ".join(part for part in (place, name, _joined(texts)) if part))
    return problems


def _joined(texts: list[str]) -> str:
    """'expected a or b, found x' from the parts that a union's members expected."""
    if len(texts) == 1:
        return texts[0]
    heads, tails = zip(*(text.rpartition(", found ")[::2] for text in texts), strict=True)
    if not all(head.startswith("expected ") for head in heads):
        return "; ".join(texts)
    return f"expected {' or '.join(dict.fromkeys(head[9:] for head in heads))}, found {tails[0]}"


def _walk(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> tuple[Keys, Any]:
    """The part of pydantic's location that stands in the values (the rest names members of unions), and the value."""
    keys: list[str | int] = []
    for part in loc:
        inside = isinstance(values, Mapping) and part in values
        inside = inside or (isinstance(values, list | tuple) and isinstance(part, int) and part < len(values))
        if inside:
            values = values[part]
        if inside or missing:
            keys.append(part)
        if not inside:
            break
    return tuple(keys), values


def _expectation(detail: Any, keys: Keys, model_cls: type[BaseModel], found: Any) -> str:
    kind, message = detail["type"], str(detail["msg"])
    if kind == "extra_forbidden":
        known = list(_fields_at(model_cls, keys[:-1]))
        hint = f"; known are {', '.join(known)}" if 0 < len(known) <= 12 else ""
        return f"unknown option{near_miss(str(keys[-1]), known) or hint}"
    if kind == "missing":
        return "a value is missing here" if isinstance(keys[-1], int) else "needed, and there is no default"
    if kind in ("value_error", "assertion_error"):
        return message.partition(", ")[2] or message
    for start in ("Input should be ", "Value should have ", "Value should be "):
        message = message.removeprefix(start)
    if kind == "literal_error" and isinstance(found, str):
        message += near_miss(found, re.findall(r"'([^']*)'", message))
    message = message.split(", unable to")[0].replace("valid ", "")
    for word, ours in _WORDS.items():
        message = message.replace(word, ours)
    message, semicolon, hint = message.replace("a true or false", "true or false").partition("; ")
    return f"expected {message}, found {shorten(found)}{semicolon}{hint}"


def _fields_at(model_cls: type[BaseModel], keys: Keys) -> Iterable[str]:
    """Names of the fields of the nested model at ``keys``."""
    for key in keys:
        field = model_cls.model_fields.get(str(key))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return ()
        model_cls = inner
    return model_cls.model_fields
