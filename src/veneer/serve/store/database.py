"""SQLite with write-ahead logging: one file, one connection, whole transactions, numbered migrations.

A migration is committed together with its number, so a killed server finds the old schema or the new one.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.errors import CheckpointError

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE files (
            number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, filename TEXT NOT NULL, purpose TEXT NOT NULL,
            bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER)""",
        """CREATE TABLE adapters (
            name TEXT PRIMARY KEY, folder TEXT NOT NULL, source TEXT NOT NULL, loaded INTEGER NOT NULL, created_at INTEGER NOT NULL,
            job TEXT)""",
        """CREATE TABLE jobs (
            number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE, status TEXT NOT NULL,
            created_at INTEGER NOT NULL, finished_at INTEGER, request TEXT NOT NULL, training_file TEXT NOT NULL,
            validation_file TEXT, seed INTEGER NOT NULL, metadata TEXT NOT NULL, error TEXT, trained_tokens INTEGER,
            steps INTEGER, step INTEGER NOT NULL DEFAULT 0, seconds REAL, result_file TEXT)""",
        "CREATE INDEX jobs_by_status ON jobs (status)",
        """CREATE TABLE events (
            number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL REFERENCES jobs (id), seq INTEGER NOT NULL, key TEXT NOT NULL,
            created_at INTEGER NOT NULL, level TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL,
            UNIQUE (job, seq), UNIQUE (job, key))""",
        """CREATE TABLE checkpoints (
            number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL REFERENCES jobs (id),
            step INTEGER NOT NULL, created_at INTEGER NOT NULL, metrics TEXT NOT NULL, UNIQUE (job, step))""",
        """CREATE TABLE creations (
            caller TEXT NOT NULL, body TEXT NOT NULL, idempotency_key TEXT, retried INTEGER NOT NULL, created_at REAL NOT NULL,
            job TEXT NOT NULL REFERENCES jobs (id))""",
        "CREATE INDEX creations_by_body ON creations (caller, body)",
    ),
)
"""Statements that make each version of the schema from the one before."""


class Database:
    """A database file. Its methods may be called from any thread."""

    def __init__(self, file: Path, migrations: tuple[tuple[str, ...], ...] = MIGRATIONS) -> None:
        """Open the file, which is created if it does not exist, and bring its schema up to date.

        Raises:
            CheckpointError: the file cannot be opened, or a newer version of Veneer wrote it.
        """
        self.file = file
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(file, timeout=30, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",
                "foreign_keys = ON",
            ):
                self._connection.execute(f"PRAGMA {pragma}")
            self._migrate(migrations)
        except sqlite3.Error as error:
            raise CheckpointError(
                f"{file} cannot be used: {error}; restore it from a copy, or choose another --state"
            ) from error

    def _migrate(self, migrations: tuple[tuple[str, ...], ...]) -> None:
        with self.transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version > len(migrations):
                raise CheckpointError(
                    f"{self.file} has version {version}, and this version of Veneer knows up to {len(migrations)}; update Veneer"
                )
            for statements in migrations[version:]:
                for statement in statements:
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {len(migrations)}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside this context together, or nothing if it raises."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()  # nothing if SQLite has rolled back itself, as when the disk is full
                raise

    def run(self, sql: str, *values: Any) -> int:
        """Execute a statement; returns the number of rows that it changed."""
        with self._lock:
            return self._connection.execute(sql, values).rowcount

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """The rows that a statement returns."""
        with self._lock:
            return [dict(row) for row in self._connection.execute(sql, values)]

    def row(self, sql: str, *values: Any) -> dict[str, Any] | None:
        """The first row that a statement returns, or None."""
        return next(iter(self.rows(sql, *values)), None)

    def page(
        self,
        table: str,
        *,
        where: str = "1",
        values: tuple[Any, ...] = (),
        after: str | None,
        limit: int,
        ascending: bool,
    ) -> tuple[list[dict[str, Any]], bool] | None:
        """A page of a table in the order in which its rows came, and whether more follow.

        Args:
            table: the table.
            where, values: a condition with its values.
            after: id of the row before the page; None begins at the start.
            limit: maximum rows of a page.
            ascending: oldest rows first.

        Returns:
            The rows and True if there are more, or None if no row has the id ``after``.
        """
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        condition = f"({where})"
        if after is not None:
            last = self.row(f"SELECT number FROM {table} WHERE id = ?", after)
            if last is None:
                return None
            condition += f" AND number {sign} {int(last['number'])}"
        found = self.rows(
            f"SELECT * FROM {table} WHERE {condition} ORDER BY number {order} LIMIT ?", *values, limit + 1
        )
        return found[:limit], len(found) > limit

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()
