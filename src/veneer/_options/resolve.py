"""Resolve options from flags, ``--set``, a YAML file and defaults, and record where each value was given.

Precedence: flag > ``--set a.b=c`` > YAML > default. Text from the command line is parsed by the field's type (see ``text.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from veneer._options.base import Options, current_name, current_names, describe, flag_name
from veneer._options.text import locate, read
from veneer._options.yaml_file import Document, Keys, load_yaml
from veneer.errors import ConfigError, Problems

OptionsT = TypeVar("OptionsT", bound=Options)
_SHOWN = 200

Provenance = dict[str, str]
"""Dotted key -> where its value was given: 'run.yaml, line 3', '--set r=8', '--r'. Defaults are not included."""


@dataclass(frozen=True)
class Difference:
    """An option whose value is not its default."""

    key: str
    value: Any
    default: Any
    source: str

    def __str__(self) -> str:
        text = show(self.value)
        if len(text) > _SHOWN:  # a sweep of many values; the saved configuration has them all
            text = f"{text[:_SHOWN]}... ({len(text):,} characters)"
        return f"{self.key} = {text} (default {show(self.default)}; {self.source})"


def resolve(
    model_cls: type[OptionsT],
    yaml_path: str | Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> tuple[OptionsT, Provenance]:
    """Resolve options.

    Args:
        model_cls: the set of options.
        yaml_path: a YAML file.
        sets: ``KEY=VALUE`` texts.
        flags: dotted key -> text, list of texts, or a value that is used as it is.

    Returns:
        The options, and where each value was given.

    Raises:
        ConfigError: lists all problems of all sources, each with its place, key and remedy.
    """
    document = load_yaml(yaml_path) if yaml_path is not None else Document("")
    values = current_names(model_cls, _copied(document.values))
    origins: dict[Keys, str] = {
        (current_name(model_cls, str(keys[0])), *keys[1:]): document.place(keys) for keys in document.lines if keys
    }
    problems = Problems()
    given: dict[str, tuple[str, Any]] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problems.add(f"--set {text}: expected KEY=VALUE")
            continue
        given[f"--set {text}"] = (key.strip(), value.strip())
    given.update((flag_name(key), (key, value)) for key, value in (flags or {}).items())
    for origin, (key, value) in given.items():
        try:
            _put(model_cls, key, value, origin, values, origins)
        except ConfigError as error:
            problems.add(f"{origin}: {error}")

    def where(keys: Keys) -> str:
        return next((origins[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in origins), document.source)

    options = None
    try:
        options = model_cls.model_validate(values)
    except ValidationError as error:
        for problem in describe(error, model_cls, values, where):
            problems.add(problem)
    problems.raise_if_any(ConfigError, "invalid configuration")
    assert options is not None
    return options, {".".join(map(str, keys)): origin for keys, origin in origins.items()}


def differences(options: BaseModel, provenance: Mapping[str, str] | None = None) -> list[Difference]:
    """Options whose value is not their default, in the order of declaration, nested ones by dotted key."""
    found: list[Difference] = []
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if isinstance(value, BaseModel):
            inner = {key[len(name) + 1 :]: at for key, at in (provenance or {}).items() if key.startswith(f"{name}.")}
            found += [Difference(f"{name}.{d.key}", d.value, d.default, d.source) for d in differences(value, inner)]
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if value != default or type(value) is not type(default):
            found.append(Difference(name, value, default, _source(name, provenance or {})))
    return found


def _source(name: str, provenance: Mapping[str, str]) -> str:
    """The place where an option was given, and the flags that changed something inside it afterwards."""
    inside = [origin for key, origin in provenance.items() if key.startswith(f"{name}.") and origin.startswith("--")]
    return " and ".join(filter(None, [provenance.get(name), *dict.fromkeys(inside)])) or "set in Python"


def show(value: Any) -> str:
    """A value as it would be typed after a flag."""
    if isinstance(value, tuple | list):
        return ",".join(map(show, value)) or "nothing"
    if isinstance(value, dict):
        return ",".join(f"{key}={show(inner)}" for key, inner in value.items()) or "nothing"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _copied(value: Any) -> Any:
    """Copy containers, since an alias in a YAML file makes two keys share one object."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _put(
    model_cls: type[BaseModel], dotted: str, given: Any, origin: str, values: dict[str, Any], origins: dict[Keys, str]
) -> None:
    """Write one value at a dotted key, replacing the value there."""
    head, dot, rest = dotted.partition(".")
    keys, annotation = locate(model_cls, current_name(model_cls, head) + dot + rest)
    if annotation is not None:
        given = read(given, annotation)
    for part in keys[:-1]:
        inner = values.get(str(part))
        if not isinstance(inner, dict):
            inner = values[str(part)] = {}
        values = inner
    values[str(keys[-1])] = given
    for old in [old for old in origins if old[: len(keys)] == keys]:
        del origins[old]
    origins[keys] = origin
