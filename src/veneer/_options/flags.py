"""Command-line flags that derive from options: ``learning_rate`` becomes ``--learning-rate``.

A yes-or-no option ``x`` becomes ``--x`` and ``--no-x``; a list takes commas or repeats the flag; a mapping takes
``a=b,c=d``; everything can also be said with ``--set a.b=c``. The help is the field's docstring with its default. Flags
stand in one group for each class that declares them, under the first line of its docstring.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from veneer._options.resolve import flag_name, show
from veneer._options.text import Kinds, kinds_of

_PREFIX = "option:"
_SETS = "option sets"


def add_flags(parser: argparse.ArgumentParser, model_cls: type[BaseModel], skip: Collection[str] = ()) -> None:
    """Add a flag for every option except those in ``skip`` (dotted keys), and ``--set``."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key, field, owner in _leaves(model_cls):
        if key in skip:
            continue
        title = (owner.__doc__ or owner.__name__).strip().splitlines()[0].rstrip(".")
        group = groups.setdefault(title, groups.get(title) or parser.add_argument_group(title))
        _add(group, key, field)
    parser.add_argument(
        "--set", dest=_SETS, action="append", default=[], metavar="KEY=VALUE", help="any option by its name in YAML"
    )


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What was said with the flags of ``add_flags``: dotted key -> text, list of texts, or true or false."""
    return {name[len(_PREFIX) :]: value for name, value in vars(args).items() if name.startswith(_PREFIX)}


def given_sets(args: argparse.Namespace) -> list[str]:
    """The texts that were given with ``--set``."""
    return list(getattr(args, _SETS, []))


def _leaves(model_cls: type[BaseModel], before: str = "") -> list[tuple[str, FieldInfo, type[BaseModel]]]:
    """(dotted key, field, class that declares it) of every option, nested ones in place."""
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
    common: dict[str, Any] = {"dest": _PREFIX + key, "default": argparse.SUPPRESS, "help": _help(field)}
    if kinds.plain == [bool] and not (kinds.words or kinds.none):
        group.add_argument(flag_name(key), action=argparse.BooleanOptionalAction, **common)
    elif kinds.item is not None or kinds.entry is not None:
        group.add_argument(flag_name(key), action="append", metavar=_metavar(kinds), **common)
    else:
        group.add_argument(flag_name(key), metavar=_metavar(kinds), **common)


def _metavar(kinds: Kinds) -> str:
    if kinds.entry is not None:
        return "KEY=VALUE,..."
    if kinds.item is not None:
        return f"{_metavar(kinds_of(kinds.item))},..."
    names = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH", "bool": "true|false"}
    parts = [str(word) for word in kinds.words] + [
        names[kind.__name__] for kind in kinds.plain if kind.__name__ in names
    ]
    return "|".join(parts) or "VALUE"


def _help(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    default = "needed" if field.is_required() else f"default: {show(field.get_default(call_default_factory=True))}"
    return f"{text} ({default})".replace("%", "%%")
