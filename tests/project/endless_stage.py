"""A stage that finds one thing and then does not end."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.device.supervise import Row, Setting, figure


def run(setting: Setting) -> Iterator[Row]:
    """One row, and no end within the limit."""
    yield figure("first", 1.0)
    time.sleep(setting.seconds + 60)
