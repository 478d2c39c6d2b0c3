"""``Options``, the base class of all sets of options, and the messages for values that do not validate.

An option is one field with a type, a default and a docstring. Flags, YAML, JSON Schema, saved configurations and documentation derive
from it.

Numbers are strict: ``true`` is not 1 and "16" is not 16. Use the types below in place of plain ``int``, ``float`` and ``bool``; a test
checks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator

from veneer._options.docstrings import field_docstrings
from veneer._options.synonyms import near_miss, similar
from veneer._options.text import WHOLE
from veneer._options.yaml_file import Keys, shorten
from veneer.errors import ConfigError, Problems

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

T = TypeVar("T")
Flag = StrictBool
Count = Annotated[int, Field(strict=True, ge=1)]
"""An integer, at least 1."""
Whole = Annotated[int, Field(strict=True, ge=0)]
"""An integer, at least 0."""
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
NotNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
Fraction = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1)]
"""At least 0, less than 1."""

Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""A list of strings; a single one needs no brackets."""
Prompts = Annotated[
    tuple[Annotated[str, WHOLE], ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
"""A list of texts with commas; on the command line the flag is repeated."""
Paths = Annotated[tuple[Path, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str | Path) else value)]
"""A list of paths; a single one needs no brackets."""

PER_RUN = "option of the whole run"
PerRun = Annotated[T, PER_RUN]
"""Marks an option that belongs to the whole run, not to one of its jobs."""

FORMER_NAMES = {"share": "tokens_per_shared_pass"}
"""Former names of options, which are still accepted -> today's names."""

Where = Callable[[Keys], str]
"""Returns the place (file and line, or flag) where the value at these keys was given."""


def flag_name(key: str) -> str:
    """``learning_rate`` -> ``--learning-rate``; ``eval.every`` -> ``--eval-every``."""
    return "--" + key.replace("_", "-").replace(".", "-")


class _OptionsType(ModelMetaclass):
    """Makes each field's docstring its description, and turns a ``ValidationError`` of ``TrainOptions(...)`` into a ``ConfigError``,
    without changing how pydantic nests models."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **settings: Any) -> Any:
        for field, text in field_docstrings(namespace["__module__"], namespace["__qualname__"]).items():
            if not str(namespace["__annotations__"][field]).startswith("ClassVar"):
                namespace[field] = Field(namespace.get(field, ...), description=text)
        return super().__new__(mcs, name, bases, namespace, **settings)

    def __dir__(cls) -> list[str]:
        """Names without those of pydantic, for ``help`` and completion; the options are among them."""
        hidden = {*BaseModel.__dict__, *(name for name in super().__dir__() if name.startswith(("__pydantic", "_abc")))}
        return sorted({*super().__dir__(), *getattr(cls, "model_fields", ())} - (hidden - {*object.__dict__}))

    def __call__(cls, *args: Any, **values: Any) -> Any:
        if args:
            first = next(iter(signature(cls).parameters))
            raise ConfigError(
                f"{cls.__name__} takes its options by name, such as {first}=...; found {shorten(args[0])} without a name"
            )
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            assert issubclass(cls, BaseModel)
            problems = describe(error, cls, values)
            headline = f"invalid {cls.__name__}"
        problems.raise_if_any(ConfigError, headline)


class Options(BaseModel, metaclass=_OptionsType):
    """A frozen set of options. Unknown names are errors; each field's docstring is its description everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not FORMER_NAMES.keys() & values.keys():
            return values
        return current_names(cls, values)


def current_name(model_cls: type[BaseModel], name: str) -> str:
    """Today's name of an option that is given by a former one."""
    now = FORMER_NAMES.get(name, name)
    return now if now in model_cls.model_fields else name


def current_names(model_cls: type[BaseModel], values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Values by today's names. Raises ConfigError if an option is given by its former and its current name."""
    found: dict[Any, Any] = {}
    for key, value in values.items():
        now = current_name(model_cls, key) if isinstance(key, str) else key
        if now in found:
            former = key if key != now else next(old for old, new in FORMER_NAMES.items() if new == now)
            raise ConfigError(f"{former} is the former name of {now}, and both are given; give only {now}")
        found[now] = value
    return found


_NAMED = re.compile(r"`([^`]+)`")
"""An option in the message of a check: `name`, or `name: value`."""
_WORDS = {
    "integer": "whole number",
    "string": "text",
    "boolean": "true or false",
    "tuple": "list",
    "dictionary": "mapping",
    "Input is not a path for <class 'pathlib.Path'>": "a path",
}
"""Pydantic's names of types -> the names that users of YAML know."""


def describe(
    error: ValidationError, model_cls: type[BaseModel], values: Mapping[str, Any], where: Where | None = None
) -> Problems:
    """The problems in a pydantic error, reworded, one for each key in the order of declaration."""
    expected: dict[Keys, list[str]] = {}
    for detail in error.errors(include_url=False):
        keys, found = _walk(detail["loc"], values, missing=detail["type"] == "missing")
        expected.setdefault(keys, [])
        text = _expectation(detail, keys, model_cls, found)
        if text not in expected[keys]:
            expected[keys].append(text)
    problems = Problems()
    for keys, texts in expected.items():
        if not keys:
            for text in texts:
                problems.add(_as_given(text, values, where))
            continue
        name, text = ".".join(map(str, keys)), _joined(texts)
        place = where(keys) if where else ""
        if _names(place, name):
            name = ""
        if place.startswith("--"):
            text = text.replace("expected a mapping,", "expected KEY=VALUE,")
        problems.add(": ".join(part for part in (place, name, text) if part))
    return problems


def _as_given(text: str, values: Mapping[str, Any], where: Where | None) -> str:
    """The message of a check over several options, with each `option` or `option: value` in it written as the user gives it.

    An option from the command line is its flag, and so are those that are not given if nothing comes from a file; the others keep their
    names, behind the place of the first.
    """
    named = [found.partition(":")[0] for found in _NAMED.findall(text)]
    places = {name: where((name,)) for name in named if name in values} if where else {}
    in_file = [place for place in places.values() if not place.startswith("--")]
    flags = bool(places) and not in_file

    def written(found: re.Match[str]) -> str:
        name, colon, value = found[1].partition(": ")
        if not places.get(name, "--" if flags else "").startswith("--"):
            return found[1]
        return flag_name(name) + (f" {value}" if colon else "")

    place = "" if flags else next(iter(in_file), where(()) if where else "")
    return ": ".join(part for part in (place, _NAMED.sub(written, text)) if part)


def _names(place: str, key: str) -> bool:
    """True for a flag, or a ``--set KEY=VALUE``, that says the key itself."""
    given = place.removeprefix("--set ").partition("=")[0].lstrip("-")
    return place.startswith("--") and given.replace("-", ".").replace("_", ".") == key.replace("_", ".")


def _joined(texts: list[str]) -> str:
    """'expected a or b, found x' from the parts that a union's members expected."""
    if len(texts) == 1:
        return texts[0]
    heads, tails = zip(*(text.rpartition(", found ")[::2] for text in texts), strict=True)
    if not all(head.startswith("expected ") for head in heads):
        return "; ".join(texts)
    return f"expected {' or '.join(dict.fromkeys(head[9:] for head in heads))}, found {tails[0]}"


def _walk(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> tuple[Keys, Any]:
    """The part of pydantic's location that is in the values (the rest names members of unions), and the value there."""
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
        return "a value is missing here" if isinstance(keys[-1], int) else "required, but not given"
    if kind in ("value_error", "assertion_error"):
        return message.partition(", ")[2] or message
    for start in ("Input should be ", "Value should have ", "Value should be "):
        message = message.removeprefix(start)
    if kind == "literal_error" and isinstance(found, str):
        message += similar(found, re.findall(r"'([^']*)'", message))
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
