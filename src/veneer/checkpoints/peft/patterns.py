"""Literal names in place of patterns: what PEFT's settings say of layers, read and written without a regular expression.

PEFT takes a list of names, each of which stands for every module whose path is that name or ends in ".name"; a table of ranks or
alphas, whose keys are regular expressions that must match a path's end from a dot on; and layer numbers. Here a key is understood
where it needs no engine: names, "." for any one character, "\\." for a dot, ".*" for anything, "^" and "$". Matching takes time
proportional to pattern x path, so no pattern can hang. What needs more is told as not understood, and is never compiled.

Written are the shortest common suffixes that pick exactly the adapter's layers, checked against every module of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
_META = set("\\^$*+?{}[]()|")
ANY, RUN = object(), object()
Token = str | object


def ends_with(path: str, name: str) -> bool:
    """Whether PEFT's lists mean ``path`` by ``name``."""
    return path == name or path.endswith(f".{name}")


def understood(pattern: str) -> list[Token] | None:
    """A table's key as tokens (a character, ANY or RUN), or None where it needs more than these."""
    tokens: list[Token] = []
    body = pattern[:-1] if pattern.endswith("$") and not pattern.endswith("\\$") else pattern
    anchored = body.startswith("^")
    body = body[1:] if anchored else body
    at = 0
    while at < len(body):
        char, following = body[at], body[at + 1 : at + 2]
        if char == "." and following == "*":
            tokens.append(RUN)
            at += 2
            continue
        if char == "\\" and following and not following.isalnum():
            tokens.append(following)
            at += 2
            continue
        if char in _META or (following and following in "*+?{"):
            return None
        tokens.append(ANY if char == "." else char)
        at += 1
    return tokens


def matches_key(pattern: str, path: str) -> bool | None:
    """Whether PEFT's rank or alpha table means ``path`` by ``pattern``; None where the pattern is not understood.

    PEFT matches ``(.*\\.)?(pattern)$`` from the path's start.
    """
    tokens = understood(pattern)
    if tokens is None:
        return None
    if pattern.startswith("^"):
        return _matches(tokens, path)
    starts = [0] + [i + 1 for i, char in enumerate(path) if char == "."]
    return any(_matches(tokens, path[start:]) for start in starts)


def _matches(tokens: list[Token], text: str) -> bool:
    """Whether the whole text fits the tokens; O(tokens x text)."""
    reached = {0}
    for token in tokens:
        if token is RUN:
            reached = set(range(min(reached), len(text) + 1)) if reached else reached
        elif token is ANY:
            reached = {i + 1 for i in reached if i < len(text)}
        else:
            reached = {i + 1 for i in reached if i < len(text) and text[i] == token}
        if not reached:
            return False
    return len(text) in reached


class Table(Generic[T]):
    """A rank or alpha table of PEFT's, asked for many paths: the first key that means a path gives its value.

    Keys that are names alone are found by hashing, whatever their number: a name's dots stand for any character, so names are filed by
    length and the places of their dots, and a tail is looked up with these places blanked. The others are tried one by one.
    """

    def __init__(self, table: Mapping[str, T]) -> None:
        self._values = list(table.values())
        self._filed: dict[tuple[bool, int, tuple[int, ...]], dict[str, int]] = {}
        self._tried: list[tuple[int, str]] = []
        self._unclear: list[tuple[int, str]] = []
        self._dots: dict[tuple[bool, int], set[tuple[int, ...]]] = {}
        for number, pattern in enumerate(table):
            tokens = understood(pattern)
            if tokens is None:
                self._unclear.append((number, pattern))
            elif RUN in tokens:
                self._tried.append((number, pattern))
            else:
                self._file(pattern.startswith("^"), tokens, number)

    @property
    def tried(self) -> int:
        """How many keys must be tried one by one."""
        return len(self._tried)

    def get(self, path: str, default: T) -> tuple[T, list[str]]:
        """The value for a path, and the keys before its own that are not understood."""
        hits = [number for number, pattern in self._tried if matches_key(pattern, path)]
        for anchored, tail in ((True, path), *((False, tail) for tail in tails(path))):
            for dots in self._dots.get((anchored, len(tail)), ()):
                number = self._filed[anchored, len(tail), dots].get(_blanked(tail, dots))
                if number is not None:
                    hits.append(number)
        first = min(hits, default=len(self._values))
        unclear = [pattern for number, pattern in self._unclear if number < first]
        return (self._values[first] if hits else default), unclear

    def _file(self, anchored: bool, tokens: list[Token], number: int) -> None:
        dots = tuple(at for at, token in enumerate(tokens) if token is ANY)
        name = "".join(token if isinstance(token, str) else "\0" for token in tokens)
        self._dots.setdefault((anchored, len(name)), set()).add(dots)
        self._filed.setdefault((anchored, len(name), dots), {}).setdefault(name, number)


def _blanked(text: str, at: tuple[int, ...]) -> str:
    letters = list(text)
    for place in at:
        letters[place] = "\0"
    return "".join(letters)


def lookup(table: Mapping[str, T], path: str, default: T) -> tuple[T, list[str]]:
    """The value of the first key that means ``path``, and the keys before it that are not understood."""
    return Table(table).get(path, default)


def layer_of(path: str, pattern: str | None = None) -> int | None:
    """The layer number that PEFT's ``layers_to_transform`` reads from a path, or None.

    Without a pattern: the first number behind at least two names and before another. With one: the number behind that name.
    """
    parts = path.split(".")
    for at in range(1, len(parts) - 1):
        if not parts[at].isascii() or not parts[at].isdigit() or len(parts[at]) > 9:
            continue
        if at >= 2 if pattern is None else ends_with(".".join(parts[:at]), pattern):
            return int(parts[at])
    return None


def names_for(chosen: Iterable[str], every: Iterable[str]) -> list[str] | str:
    """``target_modules`` that make PEFT pick exactly ``chosen`` among the paths ``every``.

    A list of the shortest suffixes that suffice, or, where one chosen path is also the tail of another that is not chosen, an anchored
    expression of full paths.
    """
    wanted = list(dict.fromkeys(chosen))
    picked = set(wanted)
    wrong = {tail for path in every if path not in picked for tail in tails(path)}
    names: dict[str, None] = {}
    for path in wanted:
        name = next((tail for tail in tails(path) if tail not in wrong), None)
        if name is None:
            return "|".join(_escaped(path) for path in sorted(picked))
        names[name] = None
    return sorted(names)


def table_for(values: Mapping[str, T], default: T) -> dict[str, T]:
    """A rank or alpha table under which PEFT gives every path its value; paths with the default need no key."""
    if all(value == default for value in values.values()):
        return {}
    meant: dict[str, set[T]] = {}
    for path, value in values.items():
        for tail in tails(path):
            meant.setdefault(tail, set()).add(value)
    table: dict[str, T] = {}
    for path, value in values.items():
        if value != default:
            table[next((tail for tail in tails(path) if len(meant[tail]) == 1), path)] = value
    found = Table(dict(sorted(table.items())))
    if any(found.get(path, default) != (value, []) for path, value in values.items()):
        # A dot that stands for any character, or a letter that does not stand for itself: full names, spelt so that they do.
        table = {"^" + _escaped(path): value for path, value in values.items() if value != default}
    return dict(sorted(table.items()))


def tails(path: str) -> list[str]:
    """A path's tails from a dot on, shortest first, the whole path last: q_proj, self_attn.q_proj, ..."""
    parts = path.split(".")
    return [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]


def _escaped(path: str) -> str:
    return "".join(char if char.isalnum() or char == "_" else f"\\{char}" for char in path)
