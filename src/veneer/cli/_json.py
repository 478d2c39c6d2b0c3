"""Reports as JSON: numbers that JSON cannot hold become null, so that every program can read them."""

from __future__ import annotations

import json
import math
from typing import Any


def as_json(value: Any) -> str:
    """The text of plain data, indented."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
