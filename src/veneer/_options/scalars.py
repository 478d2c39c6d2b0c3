"""Unquoted scalars of YAML, by the core schema of YAML 1.2.

    null     null Null NULL ~ and the empty string
    boolean  true True TRUE false False FALSE
    integer  12 -3 0o17 0xFF
    number   1e-4 .5 3. -1.5E+3 .inf -.inf .nan
    text     everything else

PyYAML follows YAML 1.1, which reads ``1e-4`` as text, ``no`` as false and ``12:30`` as 750. YAML 1.2 reads a number, text and text.
"""

from __future__ import annotations

import math
import re

Scalar = str | int | float | bool | None

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
_LONGEST_NUMBER = 400
"""Longer text stays text, since parsing digits takes time quadratic in their number."""


def resolve_scalar(text: str) -> Scalar:
    """The value of an unquoted word.

    >>> [resolve_scalar(word) for word in ("1e-4", "no", "12:30", "0x10", "~")]
    [0.0001, 'no', '12:30', 16, None]
    """
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INTEGER.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    if _NUMBER.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return -math.inf if text.startswith("-") else math.inf
    return math.nan if text in {".nan", ".NaN", ".NAN"} else text
