"""Rows of fine-tuning jobs, their events and their checkpoints.

    validating_files -> queued -> running -> succeeded | failed
                          ^  \\       |
                       resume  pause or cancel -> paused | cancelled

Every change of a job is one transaction together with its event. Events of a job are numbered without a gap, and an event that is
recorded again, because a killed server repeats the steps since the last checkpoint, is kept once.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from veneer.serve.store.database import Database

OVER = ("succeeded", "failed", "cancelled")
RETRY_SECONDS = 15 * 60.0
"""Time within which a repeated request for a job means the job that the first one created."""

_FROM = {
    "queued": ("validating_files", "paused", "running"),
    "running": ("queued",),
    "paused": ("validating_files", "queued", "running"),
    "succeeded": ("running",),
    "failed": ("validating_files", "queued", "running"),
    "cancelled": ("validating_files", "queued", "running", "paused"),
}
"""The statuses from which each status is reached."""


@dataclass(frozen=True)
class Creation:
    """Origin of a request for a job.

    Attributes:
        caller: hash of the caller's key.
        body: hash of the request.
        idempotency_key: the client's own key for the request.
        retried: the client has sent this request before.
        arrived: ``time.time()`` of its arrival.
    """

    caller: str
    body: str
    idempotency_key: str | None
    retried: bool
    arrived: float


class JobStore:
    """The jobs of a server."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def transaction(self) -> AbstractContextManager[None]:
        """See `Database.transaction`."""
        return self._database.transaction()

    def repeated(self, creation: Creation) -> tuple[dict[str, Any] | None, bool]:
        """The job that an earlier request with the same content created, and whether an idempotency key was used for another content."""
        if creation.idempotency_key is not None:
            found = self._database.row(
                "SELECT * FROM creations WHERE caller = ? AND idempotency_key = ?",
                creation.caller,
                creation.idempotency_key,
            )
            if found is not None:
                return self.get(found["job"]), found["body"] != creation.body
            return None, False
        # The first attempt may arrive here after its retry: it was still being checked when the client gave up.
        found = self._database.row(
            "SELECT job FROM creations WHERE caller = ? AND body = ? AND idempotency_key IS NULL AND created_at > ?"
            " AND (? OR (retried AND created_at >= ?)) ORDER BY created_at DESC",
            creation.caller,
            creation.body,
            creation.arrived - RETRY_SECONDS,
            creation.retried,
            creation.arrived,
        )
        return (None if found is None else self.get(found["job"])), False

    def create(
        self,
        creation: Creation,
        *,
        request: Mapping[str, Any],
        suffix: str | None,
        training_file: str,
        validation_file: str | None,
        seed: int,
        metadata: Mapping[str, str],
        checked: bool,
    ) -> dict[str, Any]:
        """Insert a job, or return the one that the same request created before.

        ``checked``: its files have been read, so it is queued at once.
        """
        with self._database.transaction():
            job, _ = self.repeated(creation)
            if job is not None:
                return job
            job_id = f"ftjob-{secrets.token_hex(12)}"
            self._database.run(
                "INSERT INTO jobs (id, name, status, created_at, request, training_file, validation_file, seed, metadata)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                job_id,
                self._free_name(suffix, job_id),
                "queued" if checked else "validating_files",
                int(time.time()),
                json.dumps(request),
                training_file,
                validation_file,
                seed,
                json.dumps(metadata),
            )
            self._database.run(
                "INSERT INTO creations VALUES (?, ?, ?, ?, ?, ?)",
                creation.caller,
                creation.body,
                creation.idempotency_key,
                creation.retried,
                time.time(),
                job_id,
            )
            self.add_event(job_id, "created", f"Created fine-tuning job: {job_id}")
            if checked:
                self.add_event(job_id, "validated", "Files validated, job queued")
            return self[job_id]

    def _free_name(self, suffix: str | None, job_id: str) -> str:
        """The name of a job's model: its suffix if no adapter or job has it yet, else the suffix with a part of the id."""
        name = suffix or "ft"
        taken = self._database.row(
            "SELECT 1 FROM adapters WHERE name = ?1 COLLATE NOCASE UNION SELECT 1 FROM jobs WHERE name = ?1 COLLATE NOCASE",
            name,
        )
        return f"{name[:55]}-{job_id[-8:]}" if taken is not None or suffix is None else name

    def get(self, job_id: str) -> dict[str, Any] | None:
        """The row of a job, or None."""
        return self._database.row("SELECT * FROM jobs WHERE id = ?", job_id)

    def __getitem__(self, job_id: str) -> dict[str, Any]:
        row = self.get(job_id)
        if row is None:
            raise KeyError(job_id)
        return row

    def by_name(self, name: str) -> dict[str, Any] | None:
        """The job that makes a model of this name, or None."""
        return self._database.row("SELECT * FROM jobs WHERE name = ?", name)

    def with_status(self, *statuses: str) -> list[dict[str, Any]]:
        """Jobs in any of these statuses, oldest first."""
        marks = ", ".join("?" * len(statuses))
        return self._database.rows(f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY number", *statuses)

    def statuses(self) -> list[str]:
        """The status of every job."""
        return [row["status"] for row in self._database.rows("SELECT status FROM jobs")]

    def page(self, metadata: Mapping[str, str], **page: Any) -> tuple[list[dict[str, Any]], bool] | None:
        """A page of jobs whose metadata has all of these values; see `Database.page`."""
        where = " AND ".join(["1", *["json_extract(metadata, ?) = ?"] * len(metadata)])
        values = [item for key, value in metadata.items() for item in (f'$."{key}"', value)]
        return self._database.page("jobs", where=where, values=tuple(values), ascending=False, **page)

    def move(self, job_id: str, status: str, message: str, *, level: str = "info", **columns: Any) -> bool:
        """Change a job's status with an event, and set other columns; returns False if its present status does not allow it."""
        allowed = _FROM[status]
        columns = {"status": status, **columns}
        if status in OVER:
            columns["finished_at"] = int(time.time())
        with self._database.transaction():
            changed = self._database.run(
                f"UPDATE jobs SET {', '.join(f'{key} = ?' for key in columns)} WHERE id = ?"
                f" AND status IN ({', '.join('?' * len(allowed))})",
                *columns.values(),
                job_id,
                *allowed,
            )
            if changed:
                self.add_event(job_id, None, message, level=level)
        return bool(changed)

    def progress(self, job_id: str, **columns: Any) -> None:
        """Set columns of a job that tell how far it is."""
        self._database.run(
            f"UPDATE jobs SET {', '.join(f'{key} = ?' for key in columns)} WHERE id = ?", *columns.values(), job_id
        )

    # Events and checkpoints

    def add_event(
        self,
        job_id: str,
        key: str | None,
        message: str,
        *,
        level: str = "info",
        kind: str = "message",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Record an event, unless the job has one with this key already; without a key it is always recorded."""
        with self._database.transaction():
            if key is not None and self._database.row("SELECT 1 FROM events WHERE job = ? AND key = ?", job_id, key):
                return
            last = self._database.row("SELECT COALESCE(MAX(seq), 0) AS seq FROM events WHERE job = ?", job_id)
            seq = (last or {"seq": 0})["seq"] + 1
            self._database.run(
                "INSERT INTO events (job, seq, key, created_at, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                job_id,
                seq,
                key if key is not None else f"#{seq}",
                int(time.time()),
                level,
                kind,
                message,
                json.dumps(data or {}),
            )

    def events(self, job_id: str, *, after: int | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Events of a job, the newest first, before number ``after``; and whether older ones follow."""
        found = self._database.rows(
            "SELECT * FROM events WHERE job = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
            job_id,
            after or 1 << 62,
            limit + 1,
        )
        return found[:limit], len(found) > limit

    def add_checkpoint(self, job_id: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Record a checkpoint, once per step."""
        self._database.run(
            "INSERT OR IGNORE INTO checkpoints (id, job, step, created_at, metrics) VALUES (?, ?, ?, ?, ?)",
            f"ftckpt-{secrets.token_hex(12)}",
            job_id,
            step,
            int(time.time()),
            json.dumps(metrics),
        )

    def checkpoints(self, job_id: str, **page: Any) -> tuple[list[dict[str, Any]], bool] | None:
        """A page of a job's checkpoints, the newest first; see `Database.page`."""
        return self._database.page("checkpoints", where="job = ?", values=(job_id,), ascending=False, **page)

    def steps_of(self, job_id: str) -> list[int]:
        """Steps of a job's checkpoints, the newest first."""
        return [
            row["step"]
            for row in self._database.rows("SELECT step FROM checkpoints WHERE job = ? ORDER BY step DESC", job_id)
        ]

    def forget_checkpoint(self, job_id: str, step: int) -> None:
        """Delete the row of a checkpoint."""
        self._database.run("DELETE FROM checkpoints WHERE job = ? AND step = ?", job_id, step)
