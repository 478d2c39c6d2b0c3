"""The state of a server: migrations, pages, transitions of jobs, events without gaps, files that expire, keys."""

from __future__ import annotations

import io
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import CheckpointError, ConfigError
from veneer.serve.keys import read_keys
from veneer.serve.store.database import MIGRATIONS, Database
from veneer.serve.store.files import FileStore, TooLargeError
from veneer.serve.store.jobs import Creation, JobStore


def store(tmp_path: Path) -> tuple[Database, JobStore]:
    database = Database(tmp_path / "state.db")
    return database, JobStore(database)


def create(
    jobs: JobStore, body: str, *, retried: bool = False, key: str | None = None, arrived: float | None = None
) -> Any:
    creation = Creation("caller", body, key, retried, time.time() if arrived is None else arrived)
    options: Any = {
        "request": {},
        "suffix": None,
        "training_file": "f",
        "validation_file": None,
        "seed": 0,
        "metadata": {},
    }
    return jobs.create(creation, checked=True, **options)


def test_migrations_are_whole(tmp_path: Path) -> None:
    """A migration that fails leaves the schema before it; a newer schema is refused."""
    Database(tmp_path / "state.db").close()
    broken = (*MIGRATIONS, ("CREATE TABLE extra (x)", "nonsense"))
    with pytest.raises(CheckpointError, match="cannot be used"):
        Database(tmp_path / "state.db", broken)
    newer = (*MIGRATIONS, ("CREATE TABLE extra (x)",))
    Database(tmp_path / "state.db", newer).close()
    with pytest.raises(CheckpointError, match="update Veneer"):
        Database(tmp_path / "state.db")


def test_transactions_of_many_threads(tmp_path: Path) -> None:
    """Events of ten writers, each through its own connection, are all there and numbered without a gap."""
    database, jobs = store(tmp_path)
    job = create(jobs, "a")["id"]

    def write(number: int) -> None:
        own = Database(tmp_path / "state.db")
        for i in range(20):
            JobStore(own).add_event(job, f"{number}-{i % 15}", "text")
        own.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events, more = jobs.events(job, after=None, limit=1000)
    assert [event["seq"] for event in events] == list(range(152, 0, -1)) and not more
    database.close()


def test_statuses_of_jobs(tmp_path: Path) -> None:
    """Only allowed transitions happen, each with an event; what is over stays over."""
    database, jobs = store(tmp_path)
    job = create(jobs, "a")["id"]
    assert not jobs.move(job, "succeeded", "no") and jobs.move(job, "running", "go")
    assert jobs.move(job, "paused", "wait") and not jobs.move(job, "running", "no")
    assert jobs.move(job, "queued", "on") and jobs.move(job, "cancelled", "stop")
    for status in ("queued", "running", "paused", "failed", "succeeded", "cancelled"):
        assert not jobs.move(job, status, "no")
    messages = [event["message"] for event in jobs.events(job, after=None, limit=20)[0]]
    assert messages[:4] == ["stop", "on", "wait", "go"] and jobs[job]["finished_at"]
    database.close()


def test_repeated_creations(tmp_path: Path) -> None:
    """A retry finds the job, also when it overtakes the first attempt; an old request is not repeated."""
    database, jobs = store(tmp_path)
    first = create(jobs, "a")
    assert create(jobs, "a", retried=True)["id"] == first["id"] != create(jobs, "a")["id"]
    late = time.time() - 5  # the first attempt arrived before its retry, and is stored after it
    retry = create(jobs, "b", retried=True)
    assert create(jobs, "b", arrived=late)["id"] == retry["id"]
    database.run("UPDATE creations SET created_at = created_at - 1000")
    assert create(jobs, "a", retried=True)["id"] != first["id"]
    assert create(jobs, "c", key="k")["id"] == create(jobs, "c", key="k")["id"]
    assert jobs.repeated(Creation("caller", "d", "k", False, time.time()))[1]
    database.close()


def test_pages(tmp_path: Path) -> None:
    """Pages follow each other without a gap, in both orders; an unknown id is told."""
    database, jobs = store(tmp_path)
    ids = [create(jobs, str(i))["id"] for i in range(5)]
    page = jobs.page({}, after=None, limit=2)
    assert page is not None and [row["id"] for row in page[0]] == ids[:-3:-1] and page[1]
    last = jobs.page({}, after=ids[1], limit=2)
    assert last is not None and [row["id"] for row in last[0]] == [ids[0]] and not last[1]
    assert jobs.page({}, after="none", limit=2) is None
    assert jobs.page({"a": "b"}, after=None, limit=2) == ([], False)
    database.close()


class Late:
    """A check that passes the first time."""

    def __init__(self, real: Callable[..., None]) -> None:
        self.real = real
        self.calls = 0

    def __call__(self, *args: int) -> None:
        self.calls += 1
        if self.calls > 1:
            self.real(*args)


def test_files_are_whole_and_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that is too large or breaks off leaves nothing; one whose time is over is deleted unless a job reads it."""
    database, jobs = store(tmp_path)
    files = FileStore(database, tmp_path / "files")

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError

    def receive(count: int, **options: Any) -> Any:
        given: Any = {
            "filename": "rows.jsonl",
            "purpose": "fine-tune",
            "limit": 25,
            "total_limit": 45,
            "expires_after": None,
        }
        content = Broken if options.pop("fail", False) else io.BytesIO
        return files.receive(content(b"x" * 10 * count), **{**given, **options})

    with pytest.raises(TooLargeError):
        receive(3)
    with pytest.raises(OSError):
        receive(1, fail=True)
    assert list((tmp_path / "files").iterdir()) == []
    kept = receive(2, expires_after=-1)
    database.run("UPDATE files SET expires_at = 0")
    job = jobs.create(
        Creation("c", "b", None, False, time.time()),
        request={}, suffix=None, training_file=kept["id"], validation_file=None, seed=0, metadata={}, checked=True,
    )  # fmt: skip
    assert files.get(kept["id"]) is not None
    jobs.move(job["id"], "cancelled", "stop")
    assert files.get(kept["id"]) is None and list((tmp_path / "files").iterdir()) == []
    receive(2), receive(2)
    with pytest.raises(TooLargeError, match="at most 45 bytes of files"):
        receive(1)
    monkeypatch.setattr(files, "_check_room", late := Late(files._check_room))
    with pytest.raises(TooLargeError):  # of two uploads at once, the second is refused when the first is there
        receive(1)
    assert late.calls == 2
    (tmp_path / "files" / "left.tmp-00000000").write_bytes(b"x")
    FileStore(database, tmp_path / "files")
    assert len(list((tmp_path / "files").iterdir())) == 2
    database.close()


def test_full_disk_changes_nothing(tmp_path: Path) -> None:
    """A transaction that finds the disk full is undone, and the next one works."""
    database, jobs = store(tmp_path)
    database.run("PRAGMA max_page_count = 20")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        create(jobs, "x" * 200_000)
    database.run("PRAGMA max_page_count = 100000")
    assert jobs.statuses() == [] and create(jobs, "a")["status"] == "queued"
    database.close()


def test_keys(tmp_path: Path) -> None:
    """Keys come from the environment, a file, or are made once; two roles, and wrong keys have none."""
    made = tmp_path / "keys"
    keys = read_keys({}, None, made)
    stored = dict(line.split("=", 1) for line in made.read_text(encoding="utf-8").splitlines())
    assert keys.role(stored["VENEER_API_KEY"]) == "user" and keys.role(stored["VENEER_ADMIN_KEY"]) == "admin"
    assert keys.role("") is None and keys.role(stored["VENEER_API_KEY"][:-1]) is None
    assert read_keys({}, None, made) == keys and made.stat().st_mode & 0o777 == 0o600
    file = tmp_path / "mine"
    file.write_text("# keys\nVENEER_API_KEY=from-a-file\n", encoding="utf-8")
    assert read_keys({"VENEER_ADMIN_KEY": "from-outside"}, file, made).role("from-a-file") == "user"
    file.write_text("API_KEY=from-a-file\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1: expected VENEER_API_KEY=KEY"):
        read_keys({}, file, made)
    with pytest.raises(ConfigError, match="are the same"):
        read_keys({"VENEER_API_KEY": "same-key", "VENEER_ADMIN_KEY": "same-key"}, None, made)
