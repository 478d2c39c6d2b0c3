"""Uploaded files: content in one folder under names that the server makes, everything else in rows."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, BinaryIO

from veneer._files import aside, sync
from veneer.serve.store.database import Database

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PIECE = 1 << 20
_SHOWN = re.compile(r"[^A-Za-z0-9._ -]+")


class TooLargeError(ValueError):
    """More bytes than a limit allows."""


class FileStore:
    """The files of a server."""

    def __init__(self, database: Database, folder: Path) -> None:
        """``folder`` is created if it does not exist; unfinished uploads of a killed server are removed from it."""
        self._database = database
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        known = {self.path(row).name for row in database.rows("SELECT * FROM files")}
        for left in folder.iterdir():
            if left.name not in known:
                left.unlink(missing_ok=True)

    def path(self, row: dict[str, Any]) -> Path:
        """Path of a file's content. The suffix tells its format."""
        suffix = Path(row["filename"]).suffix.lower()
        return self.folder / f"{row['id']}{suffix if suffix in _SUFFIXES else ''}"

    def receive(
        self,
        content: BinaryIO,
        *,
        filename: str,
        purpose: str,
        limit: int,
        total_limit: int,
        expires_after: int | None,
    ) -> dict[str, Any]:
        """Store an upload. This takes time in proportion to its size; call it off the event loop.

        Args:
            content: a file with the content, from its beginning.
            filename: the client's name for it, which names no file here.
            purpose: the client's purpose.
            limit: maximum size of the file in bytes.
            total_limit: maximum size of all files together in bytes.
            expires_after: seconds until the file is deleted; None keeps it.

        Raises:
            TooLargeError: the file is too large. Nothing was stored.
            OSError: the disk is full. Nothing was stored.
        """
        row = _new_row(filename, purpose, expires_after)
        size = content.seek(0, os.SEEK_END)
        content.seek(0)
        if size > limit:
            raise TooLargeError(f"expected at most {limit:,} bytes, found {size:,}")
        self._check_room(size, total_limit)
        digest, beside = hashlib.sha256(), aside(self.path(row))
        try:
            with beside.open("xb") as file:
                while piece := content.read(_PIECE):
                    digest.update(piece)
                    file.write(piece)
            return self._keep({**row, "bytes": size, "sha256": digest.hexdigest()}, beside, total_limit)
        finally:
            beside.unlink(missing_ok=True)

    def _check_room(self, size: int, total_limit: int) -> None:
        (used,) = self._database.rows("SELECT COALESCE(SUM(bytes), 0) AS bytes FROM files")
        if used["bytes"] + size > total_limit:
            raise TooLargeError(f"the server keeps at most {total_limit:,} bytes of files; delete some")

    def add(self, content: bytes, *, filename: str, purpose: str) -> dict[str, Any]:
        """Store a file that the server made."""
        row = _new_row(filename, purpose, None)
        beside = aside(self.path(row))
        try:
            beside.write_bytes(content)
            return self._keep({**row, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, beside)
        finally:
            beside.unlink(missing_ok=True)

    def _keep(self, row: dict[str, Any], beside: Path, total_limit: int | None = None) -> dict[str, Any]:
        """Put a finished file in its place and into the table."""
        sync(beside)
        final = self.path(row)
        keys = ("id", "filename", "purpose", "bytes", "sha256", "created_at", "expires_at")
        try:
            with self._database.transaction():
                if total_limit is not None:
                    self._check_room(row["bytes"], total_limit)  # again: other uploads may have ended in the meantime
                beside.replace(final)
                sync(self.folder)
                self._database.run(
                    f"INSERT INTO files ({', '.join(keys)}) VALUES ({', '.join('?' * len(keys))})",
                    *(row[key] for key in keys),
                )
        except BaseException:
            final.unlink(missing_ok=True)
            raise
        return row

    def get(self, file_id: str) -> dict[str, Any] | None:
        """The row of a file that has not expired."""
        self.expire()
        return self._database.row("SELECT * FROM files WHERE id = ?", file_id)

    def page(self, purpose: str | None, **page: Any) -> tuple[list[dict[str, Any]], bool] | None:
        """A page of files; see `Database.page`."""
        self.expire()
        where, values = ("1", ()) if purpose is None else ("purpose = ?", (purpose,))
        return self._database.page("files", where=where, values=values, **page)

    def delete(self, file_id: str) -> bool:
        """Delete a file; returns False if there is none of this id."""
        row = self._database.row("SELECT * FROM files WHERE id = ?", file_id)
        if row is None:
            return False
        self._database.run("DELETE FROM files WHERE id = ?", file_id)
        self.path(row).unlink(missing_ok=True)
        return True

    def expire(self) -> None:
        """Delete files whose time is over and that no unfinished job reads."""
        over = self._database.rows("SELECT id FROM files WHERE expires_at <= ?", int(time.time()))
        for row in over:
            if not self.in_use(row["id"]):
                self.delete(row["id"])

    def in_use(self, file_id: str) -> bool:
        """True if an unfinished job reads the file."""
        found = self._database.row(
            "SELECT 1 FROM jobs WHERE (training_file = ? OR validation_file = ?)"
            " AND status NOT IN ('succeeded', 'failed', 'cancelled')",
            file_id,
            file_id,
        )
        return found is not None


def _new_row(filename: str, purpose: str, expires_after: int | None) -> dict[str, Any]:
    now = int(time.time())
    return {
        "id": f"file-{secrets.token_hex(12)}",
        "filename": _SHOWN.sub("_", filename)[-200:] or "file",
        "purpose": purpose,
        "created_at": now,
        "expires_at": None if expires_after is None else now + expires_after,
    }
