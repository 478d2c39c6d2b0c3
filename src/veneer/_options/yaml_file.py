"""Read a YAML file of options into plain values with their line numbers.

The reader accepts one document of mappings, lists and YAML 1.2 scalars (see ``scalars.py``). It rejects tags, so that a file cannot name a
class, and duplicate keys, all of which are reported at once. Size, depth and the expansion of aliases are limited. Keys stay text.

It consumes PyYAML's event stream, whose parser keeps its own stack, so that deep nesting cannot exhaust Python's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer._options.scalars import resolve_scalar
from veneer.errors import ConfigError, Problems

Keys = tuple[str | int, ...]
"""Path to a value: keys of mappings and indices of lists, from the top."""

MOST_BYTES = 1_000_000
MOST_DEPTH = 32
MOST_VALUES = 100_000
"""Maximum number of values in a document, with aliases expanded."""


@dataclass(frozen=True)
class Document:
    """The values of one file and the line of each, counted from 1."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Keys, int] = field(default_factory=dict)

    def place(self, keys: Keys) -> str:
        """'run.yaml, line 3' for the value at ``keys``, or for the innermost value around it that has a line."""
        for stop in range(len(keys), 0, -1):
            if keys[:stop] in self.lines:
                return f"{self.source}, line {self.lines[keys[:stop]]}"
        return self.source


def load_yaml(path: str | Path) -> Document:
    """Read a file of options. Raises ConfigError with file, line and key."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror or error}") from error
    except ValueError as error:  # a NUL byte in the name
        raise ConfigError(f"{str(path)!r} is not a file name: {error}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path}: the configuration has more than {MOST_BYTES:,} bytes; is this a file of examples?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: the file is not UTF-8 text; save it as UTF-8") from error
    values, lines = parse_yaml(text, str(path))
    if values is None:
        return Document(str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}, line {lines[()]}: expected 'option: value' lines, found {shorten(values)}")
    return Document(str(path), values, lines)


def parse_yaml(text: str, source: str) -> tuple[Any, dict[Keys, int]]:
    """The value of one YAML document (None if it is empty) and the line of each value in it."""
    import yaml  # here, so that options made in Python do not need it

    builder = _Builder(source)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{source}, line {line}: this is not YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}, line {line}: a control character, U+{ord(text[error.position]):04X}") from error
    except (ValueError, OverflowError, yaml.YAMLError) as error:  # a \U escape or %YAML version out of range
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}, line {builder.line}: this is not YAML: {error}") from error
    builder.problems.raise_if_any(ConfigError, f"{source} cannot be used")
    return builder.value, builder.lines


def shorten(value: object, width: int = 60) -> str:
    """A value as messages show it, at most ``width`` characters; a long list or mapping is 'a list' or 'a mapping'."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    text = repr(value)
    if len(text) <= width:
        return text
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"{text[: width - 3]}..."


@dataclass
class _Open:
    """A mapping or list that has not ended yet."""

    keys: Keys
    value: dict[str, Any] | list[Any]
    anchor: str | None
    before: int
    depth: int = 1
    key: str | None = None


class _Builder:
    """Builds values from events, one event at a time."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.value: Any = None
        self.lines: dict[Keys, int] = {}
        self.problems = Problems()
        self.line = 1
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int, int]] = {}  # value, its size, its depth
        self._count = 0
        self._documents = 0

    def take(self, event: Any) -> None:
        kind = type(event).__name__
        self.line = event.start_mark.line + 1
        if getattr(event, "tag", None) not in (None, "!"):
            raise self._error(f"the tag {event.tag} is not allowed here; write the plain value")
        if kind == "DocumentStartEvent":
            self._documents += 1
            if self._documents > 1:
                raise self._error("a second document starts here; a configuration is one document")
        elif kind == "ScalarEvent":
            self._scalar(event)
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            self._begin({} if kind == "MappingStartEvent" else [], event.anchor)
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            done = self._open.pop()
            self._place(done.value, done.anchor, self._count - done.before, done.depth)
        elif kind == "AliasEvent":
            self._alias(event.anchor)

    def _scalar(self, event: Any) -> None:
        if any("\ud800" <= letter <= "\udfff" for letter in event.value):
            raise self._error("half of a surrogate pair; write the character itself")
        if self._awaits_key():
            self._key(event.value)
            return
        self._count_values(1)
        value = resolve_scalar(event.value) if event.style is None and event.tag is None else event.value
        self.lines.setdefault(self._next_keys(), self.line)
        self._place(value, event.anchor, 1, 0)

    def _begin(self, value: dict[str, Any] | list[Any], anchor: str | None) -> None:
        if self._awaits_key():
            raise self._error("a key must be a word, found a list or mapping")
        if len(self._open) >= MOST_DEPTH:
            raise self._too_deep()
        keys = self._next_keys()
        self.lines.setdefault(keys, self.line)
        self._open.append(_Open(keys, value, anchor, self._count))
        self._count_values(1)

    def _alias(self, anchor: str) -> None:
        if self._awaits_key():
            raise self._error(f"a key must be a word, found the alias *{anchor}")
        if anchor not in self._anchors:
            raise self._error(f"the alias *{anchor} has no anchor &{anchor} that ends before it")
        value, size, depth = self._anchors[anchor]
        if len(self._open) + depth > MOST_DEPTH:
            raise self._too_deep()
        self._count_values(size)
        self.lines.setdefault(self._next_keys(), self.line)
        self._place(value, None, size, depth)

    def _awaits_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].value, dict) and self._open[-1].key is None

    def _key(self, key: str) -> None:
        top = self._open[-1]
        assert isinstance(top.value, dict)
        top.key = key
        keys = (*top.keys, key)
        if key in top.value:
            dotted = ".".join(map(str, keys))
            self.problems.add(f"line {self.line}: {dotted} is given a second time, first on line {self.lines[keys]}")
        else:
            self.lines[keys] = self.line

    def _next_keys(self) -> Keys:
        if not self._open:
            return ()
        top = self._open[-1]
        return (*top.keys, len(top.value) if isinstance(top.value, list) else str(top.key))

    def _count_values(self, more: int) -> None:
        self._count += more
        if self._count > MOST_VALUES:
            raise self._error(f"more than {MOST_VALUES:,} values, with aliases written out")

    def _place(self, value: Any, anchor: str | None, size: int, depth: int) -> None:
        """Add a finished value of ``size`` values on ``depth`` levels to its parent."""
        if anchor is not None:
            self._anchors[anchor] = (value, size, depth)
        if self._open:
            self._open[-1].depth = max(self._open[-1].depth, depth + 1)
        if not self._open:
            self.value = value
        elif isinstance(top := self._open[-1].value, list):
            top.append(value)
        else:
            top[str(self._open[-1].key)] = value
            self._open[-1].key = None

    def _too_deep(self) -> ConfigError:
        return self._error(f"more than {MOST_DEPTH} levels of nesting")

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.source}, line {self.line}: {problem}")
