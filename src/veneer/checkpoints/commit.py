"""The commit protocol: a checkpoint is complete and verified, or it does not exist.

    1  write every file into a folder aside (``name.tmp-...``), each synced to the disk
    2  write MANIFEST.json with size and SHA-256 of every file, synced
    3  sync the folder, rename it to its name, sync its parent
    4  read everything back and compare with the manifest
    5  only now point LATEST at it (written aside, renamed, synced); ``veneer runs`` notices changes by it
    6  only now delete older ones, keeping two at least

The process may die at any moment: the newest folder that agrees with its manifest is a complete checkpoint, and unfinished folders are
removed at the next start. After a flipped bit a folder disagrees with its manifest, and the one before it is used.

``at`` is called by name between any two effects; tests inject faults there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer._files import ASIDE, aside, replace_text, sync, write_new
from veneer.errors import CheckpointError

MANIFEST, LATEST = "MANIFEST.json", "LATEST"
_REPLACED = f"{ASIDE}replaced"


def at(point: str) -> None:
    """A named point between two effects. Does nothing; it is where tests inject faults."""


def commit(parent: Path, name: str, write: Callable[[Path], None], *, keep: int = 2) -> Path:
    """Make the checkpoint ``parent/name`` by this protocol; ``write`` puts the files into the folder that it is given.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: the checkpoint does not read back as it was written.
        OSError: it cannot be written (a full disk). Earlier checkpoints are untouched.
    """
    parent.mkdir(parents=True, exist_ok=True)
    final, replaced = parent / name, parent / f"{name}{_REPLACED}"
    beside = aside(final)
    try:
        beside.mkdir()
        at("made aside")
        write(beside)
        at("files written")
        for file in sorted(beside.iterdir()):
            sync(file)
        manifest = json.dumps({"files": _sums(beside)}, indent=1, sort_keys=True)
        write_new(beside / MANIFEST, [manifest.encode()])
        at("manifest written")
        sync(beside)
        if final.exists():
            final.rename(replaced)
            at("older of the same name put aside")
        beside.rename(final)
        at("renamed")
        sync(parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        _put_back(replaced, final)
        raise
    at("committed")
    if not verified(final):
        raise CheckpointError(f"{final} does not read back as it was written; check the disk and its memory")
    at("verified")
    replace_text(parent / LATEST, name)
    at("pointed to")
    _prune(parent, final, keep)
    at("pruned")
    return final


def candidates(parent: Path) -> list[Path]:
    """Committed checkpoints by name, newest first, verified or not."""
    if not parent.is_dir():
        return []
    return sorted(
        (f for f in parent.iterdir() if f.is_dir() and ASIDE not in f.name), key=lambda f: f.name, reverse=True
    )


def sweep(parent: Path) -> None:
    """Remove the unfinished folders of a process that died. Only the holder of the run's lock may call this."""
    if parent.is_dir():
        for folder in list(parent.iterdir()):
            if folder.name.endswith(_REPLACED):
                _put_back(folder, folder.with_name(folder.name.removesuffix(_REPLACED)))
            elif ASIDE in folder.name:
                shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink(missing_ok=True)


def _put_back(replaced: Path, final: Path) -> None:
    """Restore a checkpoint that was being replaced by one of the same name, unless the replacement is in place."""
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        replaced.rename(final)


def verified(folder: Path) -> bool:
    """A checkpoint holds exactly the files of its manifest, to the bit."""
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_bytes())
        return bool(manifest["files"] == _sums(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sums(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted(folder.iterdir()):
        if file.name != MANIFEST:
            found[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prune(parent: Path, latest: Path, keep: int) -> None:
    """Delete checkpoints older than the ``keep`` newest good ones; ``latest`` has just been verified."""
    good = 0
    for folder in candidates(parent):
        if good < max(1, keep):
            good += folder == latest or verified(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
