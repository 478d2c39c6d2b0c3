"""The patterns by which PEFT's settings name layers, read and written without a regular expression engine.

PEFT takes lists of names, each of which means every module whose path is that name or ends in ".name"; tables of ranks or alphas, whose
keys are regular expressions that match the end of a path from a dot on; and layer numbers. Keys are understood if they consist of names,
"." for any character, "\\." for a dot, ".*", "^" and "$". Matching takes time in proportion to pattern x path, so no pattern can hang.
Other keys are reported as not understood, and are never compiled.

The writer chooses the shortest suffixes that pick exactly the adapter's layers among all modules of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
_META = set("\\^$*+?{}[]()|")
ANY, RUN = object(), object()
Token = str | object


def ends_with(path: str, name: str) -> bool:
    """PEFT's lists mean ``path`` by ``name``."""
    return path == name or path.endswith(f".{name}")


def understood(pattern: str) -> list[Token] | None:
    """The key of a table as tokens (a character, ANY or RUN), or None if it needs more than these."""
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


def _means(tokens: list[Token], anchored: bool, path: str) -> bool:
    starts = [0] if anchored else [0] + [i + 1 for i, char in enumerate(path) if char == "."]
    return any(_matches(tokens, path[start:]) for start in starts)


def _matches(tokens: list[Token], text: str) -> bool:
    """The whole text fits the tokens; O(tokens x text)."""
    reached = {0}
    for token in tokens:
        if token is RUN:
            reached = set(range(min(reached), len(text) + 1))
        else:
            reached = {i + 1 for i in reached if i < len(text) and (token is ANY or text[i] == token)}
        if not reached:
            return False
    return len(text) in reached


class PatternTable(Generic[T]):
    """A rank or alpha table of PEFT: the first key that means a path gives its value.

    Keys without ".*" are looked up, however many there are: by their anchor, their length and the positions of their any-character dots,
    with these positions blanked in the path. Keys with ".*" are tried one by one.
    """

    def __init__(self, table: Mapping[str, T]) -> None:
        self._values = list(table.values())
        self._names: dict[tuple[bool, int], dict[tuple[int, ...], dict[str, int]]] = {}
        self._unclear: list[tuple[int, str]] = []
        self.tried: list[tuple[int, list[Token], bool]] = []
        for number, pattern in enumerate(table):
            tokens, anchored = understood(pattern), pattern.startswith("^")
            if tokens is None:
                self._unclear.append((number, pattern))
            elif RUN in tokens:
                self.tried.append((number, tokens, anchored))
            else:
                dots = tuple(at for at, token in enumerate(tokens) if token is ANY)
                name = "".join(token if isinstance(token, str) else "\0" for token in tokens)
                self._names.setdefault((anchored, len(name)), {}).setdefault(dots, {}).setdefault(name, number)

    def get(self, path: str, default: T) -> tuple[T, list[str]]:
        """The value for a path, and the keys before its own that are not understood."""
        none = len(self._values)
        first = next((number for number, tokens, anchored in self.tried if _means(tokens, anchored, path)), none)
        for anchored, tail in ((True, path), *((False, tail) for tail in tails(path))):
            for dots, names in self._names.get((anchored, len(tail)), {}).items():
                first = min(first, names.get(_blanked(tail, dots), none))
        unclear = [pattern for number, pattern in self._unclear if number < first]
        return (self._values[first] if first < none else default), unclear


def _blanked(text: str, positions: Iterable[int]) -> str:
    letters = list(text)
    for at in positions:
        letters[at] = "\0"
    return "".join(letters)


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


def names_for(chosen: Iterable[str], every: Collection[str]) -> list[str] | str:
    """``target_modules`` that make PEFT pick exactly ``chosen`` among the paths ``every``.

    A list of the shortest suffixes that suffice, or, where one chosen path is also the tail of another that is not chosen, an anchored
    expression of full paths. Full paths too if ``every`` is empty: the modules of the model are not known.
    """
    picked = set(chosen)
    wrong = {tail for path in every if path not in picked for tail in tails(path)}
    if not every:
        return sorted(picked)
    names: dict[str, None] = {}
    for path in picked:
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
    read = PatternTable(dict(sorted(table.items())))
    if any(read.get(path, default) != (value, []) for path, value in values.items()):
        # A dot that means any character, or a letter that does not mean itself: escaped full names.
        table = {"^" + _escaped(path): value for path, value in values.items() if value != default}
    return dict(sorted(table.items()))


def tails(path: str) -> list[str]:
    """A path's tails from a dot on, shortest first, the whole path last: q_proj, self_attn.q_proj, ..."""
    parts = path.split(".")
    return [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]


def _escaped(path: str) -> str:
    return "".join(char if char.isalnum() or char == "_" else f"\\{char}" for char in path)
