"""Write options as YAML that reads back as the same values, and as JSON Schema for editors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from veneer._options.scalars import resolve_scalar


def given(options: BaseModel) -> dict[str, Any]:
    """The options that were given, as plain values; those that have their default because they were left out are missing."""
    return {
        name: plain(getattr(options, name)) for name in type(options).model_fields if name in options.model_fields_set
    }


def to_yaml(options: BaseModel | Mapping[str, Any]) -> str:
    """The options as a YAML file that ``load_yaml`` reads back to the same values."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that YAML 1.2 would read as another type, and never writes an alias."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Dumper, value: str) -> yaml.Node:
        style = None if isinstance(resolve_scalar(value), str) else "'"
        style = style if value.isprintable() else '"'  # PyYAML loses some kinds of line break in the other styles
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump(plain(options), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110))


def plain(value: Any) -> Any:
    """Options as plain mappings, lists, strings, numbers and None."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def json_schema(model_cls: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema (2020-12) of a set of options, with which editors complete and check YAML files."""
    schema = model_cls.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
