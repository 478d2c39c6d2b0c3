"""Parse text from the command line by the type of the option.

Text for a string option stays text, even if it looks like a number. Lists are separated by commas or written in brackets; mappings are
written as ``a=b,c=d`` or in braces; ``none`` means None where the option allows it. Text that cannot be parsed stays as it is, and
validation of the option reports it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from veneer._options.scalars import resolve_scalar
from veneer._options.yaml_file import Keys, parse_yaml

WHOLE = "text that is not split at commas"
"""Marks the items of a list whose texts may have commas."""


@dataclass
class Kinds:
    """The parts of a type: plain types, the values of its literals, and the type inside its list or mapping."""

    plain: list[type] = field(default_factory=list)
    words: list[Any] = field(default_factory=list)
    item: Any = None
    entry: Any = None
    model: type[BaseModel] | None = None
    none: bool = False
    whole: bool = False


def kinds_of(annotation: Any) -> Kinds:
    """Take a type apart, through ``Annotated``, unions, literals, tuples and dicts."""
    found = Kinds()
    waiting = [annotation]  # a queue, so that a union's members keep their order
    while waiting:
        kind = waiting.pop(0)
        origin, inner = get_origin(kind), get_args(kind)
        if origin is Annotated:
            found.whole |= WHOLE in inner[1:]
            waiting.insert(0, inner[0])
        elif origin in (Union, types.UnionType):
            waiting.extend(inner)
        elif origin is Literal:
            found.words += inner
        elif origin in (tuple, list):
            found.item = inner[0]
        elif origin is dict:
            found.entry = inner[1]
        elif kind is type(None):
            found.none = True
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            found.model = kind
        elif isinstance(kind, type):
            found.plain.append(kind)
    return found


def locate(model_cls: type[BaseModel], dotted: str) -> tuple[Keys, Any]:
    """The keys of a dotted name, and the type of the value there (None if there is no such option).

    Inside a mapping the rest is one key, since names of sites have dots: ``rank_pattern.layers.0`` is
    ``("rank_pattern", "layers.0")``.
    """
    keys: list[str | int] = []
    rest = dotted
    current: type[BaseModel] | None = model_cls
    while current is not None:
        name, dot, rest = rest.partition(".")
        keys.append(name)
        info = current.model_fields.get(name)
        if info is None:
            return (tuple(keys) if not dot else (*keys, rest)), None
        if not dot:
            return tuple(keys), info.annotation
        kinds = kinds_of(info.annotation)
        if kinds.entry is not None:
            return (*keys, rest), kinds.entry
        current = kinds.model
    return (*keys, rest), None


def read(given: Any, annotation: Any) -> Any:
    """Parse text, or the list of texts of a repeated flag; other values are returned unchanged."""
    kinds = kinds_of(annotation)
    if isinstance(given, list):
        read_all = [_read_text(text, kinds) for text in given]
        if len(given) == 1:
            return read_all[0]
        if kinds.entry is not None:
            return {key: value for part in read_all if isinstance(part, Mapping) for key, value in part.items()}
        return [item for part in read_all for item in (part if isinstance(part, list) else [part])]
    return _read_text(given, kinds) if isinstance(given, str) else given


def _read_text(text: str, kinds: Kinds) -> Any:
    if text in kinds.words:
        return text
    if kinds.item is not None and kinds_of(kinds.item).whole:
        return [text]
    if kinds.none and text.lower() in ("none", "null", "~"):
        return None
    if text[:1] in "[{" and (kinds.item is not None or kinds.entry is not None or kinds.model is not None):
        return parse_yaml(text, "this text")[0]
    if kinds.item is not None:
        item = kinds_of(kinds.item)
        parts = [text] if text.startswith("re:") else [part.strip() for part in text.split(",")]
        return [_read_text(part, item) for part in parts if part]
    if kinds.entry is not None:
        entry = kinds_of(kinds.entry)
        pairs = [part.partition("=") for part in text.split(",")]
        return {key.strip(): _read_text(value.strip(), entry) for key, _, value in pairs} if "=" in text else text
    scalar = resolve_scalar(text)
    if isinstance(scalar, bool):
        return scalar if bool in kinds.plain or scalar in kinds.words else text
    return scalar if isinstance(scalar, int | float) and {int, float} & set(kinds.plain) else text
