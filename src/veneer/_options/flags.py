"""Command-line flags derived from options: ``learning_rate`` becomes ``--learning-rate``.

A boolean option ``x`` becomes ``--x`` and ``--no-x``. Lists are separated by commas, or the flag is repeated. Mappings are written as
``a=b,c=d``. ``--set a.b=c`` sets any option. The help text is the field's docstring with its default. Each class that declares options
has a group of flags under its ``title``.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from veneer._options.base import FORMER_NAMES, flag_name
from veneer._options.resolve import show
from veneer._options.text import Kinds, kinds_of

_PREFIX = "option:"
_SETS = "option sets"


def add_flags(parser: argparse.ArgumentParser, model_cls: type[BaseModel], skip: Collection[str] = ()) -> None:
    """Add a flag for each option except those in ``skip`` (dotted keys), and ``--set``."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key, field, owner in _leaves(model_cls):
        if key in skip:
            continue
        title = getattr(owner, "title", owner.__name__)
        group = groups.setdefault(title, groups.get(title) or parser.add_argument_group(title))
        _add(group, key, field)
    parser.add_argument(
        "--set", dest=_SETS, action="append", default=[], metavar="KEY=VALUE", help="set any option by its YAML name"
    )


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags added by ``add_flags``: dotted key -> text, list of texts, or bool."""
    return {name[len(_PREFIX) :]: value for name, value in vars(args).items() if name.startswith(_PREFIX)}


def given_sets(args: argparse.Namespace) -> list[str]:
    """The values of ``--set``."""
    return list(getattr(args, _SETS, []))


def _leaves(model_cls: type[BaseModel], before: str = "") -> list[tuple[str, FieldInfo, type[BaseModel]]]:
    """(dotted key, field, declaring class) of each option, including nested ones."""
    found = []
    for name, field in model_cls.model_fields.items():
        owner = next(cls for cls in reversed(model_cls.__mro__) if name in getattr(cls, "__annotations__", ()))
        kinds = kinds_of(field.annotation)
        if kinds.model is not None and not kinds.none:
            found += _leaves(kinds.model, f"{before}{name}.")
        else:
            found.append((f"{before}{name}", field, owner))
    return found


def _add(group: argparse._ArgumentGroup, key: str, field: FieldInfo) -> None:
    kinds = kinds_of(field.annotation)
    flags = [flag_name(name) for name in (key, *(old for old, new in FORMER_NAMES.items() if new == key))]
    common: dict[str, Any] = {"dest": _PREFIX + key, "default": argparse.SUPPRESS, "help": _help(field)}
    if kinds.plain == [bool] and not (kinds.words or kinds.none):
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
    elif kinds.item is not None or kinds.entry is not None:
        group.add_argument(*flags, action="append", metavar=_metavar(kinds), **common)
    else:
        group.add_argument(*flags, metavar=_metavar(kinds), **common)


def _metavar(kinds: Kinds) -> str:
    if kinds.entry is not None:
        return "KEY=VALUE,..."
    if kinds.item is not None:
        item = kinds_of(kinds.item)
        return _metavar(item) if item.whole else f"{_metavar(item)},..."
    names = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH", "bool": "true|false"}
    parts = [str(word) for word in kinds.words] + [
        names[kind.__name__] for kind in kinds.plain if kind.__name__ in names
    ]
    return "|".join(parts) or "VALUE"


def _help(field: FieldInfo) -> str:
    """The docstring without its full stop, and the default if there is one that the docstring does not explain."""
    text = " ".join((field.description or "").split()).removesuffix(".")
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if field.is_required():
        text += " (required)"
    elif "(default: " not in text and default not in (None, (), {}):
        text += f" (default: {show(default)})"
    return text.replace("%", "%%")
