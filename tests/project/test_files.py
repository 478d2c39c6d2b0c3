"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from veneer._files import replace_bytes


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way leaves the old content and no second file."""
    path = tmp_path / "file"
    replace_bytes(path, b"old")
    replace_bytes(path, b"newer")
    assert path.read_bytes() == b"newer"

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="output error"):
        replace_bytes(path, b"newest")
    assert path.read_bytes() == b"newer" and [p.name for p in path.parent.iterdir()] == ["file"]
