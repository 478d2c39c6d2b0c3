"""Folders built once: whole or absent, whatever happens to the processes that build them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from veneer.errors import BaseModelError
from veneer.models import cache
from veneer.models.cache import build_once, cache_root

# A builder in a process of its own: it notes that it ran, takes its time, and writes two files.
BUILDER = """
import os, sys, time
from pathlib import Path
from veneer.models.cache import build_once
def build(folder):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write("built\\n")
    (folder / "first").write_text("1")
    time.sleep(float(sys.argv[1]))
    (folder / "second").write_text("2")
print(build_once("rooms/x", build))
"""


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache."""
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "home"


def _build(folder: Path) -> None:
    (folder / "file").write_text("content")


def _start(seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(seconds)], stdout=subprocess.PIPE)


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """VENEER_HOME first, then XDG_CACHE_HOME, then ~/.cache."""
    monkeypatch.setenv("VENEER_HOME", "~/here")
    assert cache_root() == Path.home() / "here"
    monkeypatch.delenv("VENEER_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/veneer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "veneer"


def test_a_folder_is_built_once_and_then_only_found(home: Path) -> None:
    """The second call does not build."""
    found = build_once("rooms/x", _build)
    assert found == home / "rooms" / "x" and (found / "file").read_text() == "content"
    assert build_once("rooms/x", lambda folder: pytest.fail("built twice")) == found


def test_a_failing_builder_leaves_nothing(home: Path) -> None:
    """Its own error comes through, and the next builder starts from nothing."""

    def fail(folder: Path) -> None:
        _build(folder)
        raise BaseModelError("broken")

    with pytest.raises(BaseModelError, match="broken"):
        build_once("rooms/x", fail)
    assert [p for p in (home / "rooms").iterdir() if p.is_dir()] == []
    assert build_once("rooms/x", _build).is_dir()


def test_two_processes_build_once(home: Path, tmp_path: Path) -> None:
    """The second waits for the first and takes its folder."""
    processes = [_start(0.5), _start(0.5)]
    outputs = [process.communicate(timeout=60)[0].decode().strip() for process in processes]
    assert outputs == [str(home / "rooms" / "x")] * 2
    assert (tmp_path / "notes").read_text() == "built\n"
    assert sorted(p.name for p in (home / "rooms" / "x").iterdir()) == ["first", "second"]


def test_a_killed_builder_leaves_nothing_that_anyone_reads(home: Path, tmp_path: Path) -> None:
    """kill -9 in the middle: no folder; the next builder is not blocked, sweeps up, and builds the whole."""
    process = _start(60)
    while not (tmp_path / "notes").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert process.stdout is not None
    process.stdout.close()
    assert not (home / "rooms" / "x").exists()
    build_once("rooms/x", _build)
    assert sorted(p.name for p in (home / "rooms").iterdir()) == ["x", "x.lock"]


def test_without_locks_the_first_rename_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no file locks, a builder that comes second keeps the first one's folder."""
    monkeypatch.setitem(sys.modules, "fcntl", None)

    def second(folder: Path) -> None:
        build_once("rooms/x", _build)
        (folder / "file").write_text("late")

    assert (build_once("rooms/x", second) / "file").read_text() == "content"


def test_a_cache_that_cannot_be_written_is_one_sentence_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A home below a file, and a disk that is full."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(BaseModelError, match="VENEER_HOME"):
        build_once("rooms/x", _build)

    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "full"))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(BaseModelError, match="No space left") as caught:
        build_once("rooms/x", _build)
    assert "GB free" in str(caught.value)
    assert [p for p in (tmp_path / "full" / "rooms").iterdir() if p.is_dir()] == []
