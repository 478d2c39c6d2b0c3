"""Upload an adapter folder to a model hub, through the hub's own client.

All files go up in one commit, so that nobody sees half an adapter, and the hub's list of files is compared with the folder afterwards.
The client reads the token and the endpoint from its environment (HF_TOKEN, HF_ENDPOINT) or from its login.

Boundary: uploads the files of one PEFT folder that has been read before; nothing else leaves this machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.checkpoints.locate import CONFIG, WEIGHTS
from veneer.errors import ConfigError, ExportError

CARD = "README.md"
_FILES = (CONFIG, WEIGHTS, "chat_template.jinja")
_REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True, slots=True)
class PushedAdapter:
    """The commit that `push_adapter` made."""

    url: str
    """Page of the repository."""
    commit: str
    files: dict[str, int]
    """Size in bytes by name."""
    pull_request: str | None = None
    """Page of the pull request, if one was opened."""


def check_repo(repo: str) -> None:
    """Raise ConfigError if ``repo`` is not a name of a repository on the hub."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise ConfigError(
            f"{repo!r} is not a repository on the hub; expected NAME or OWNER/NAME, such as me/my-adapter"
        )


def files_of(folder: Path, card: str) -> dict[str, bytes]:
    """The files that are uploaded, by name: those of the adapter folder, and ``card`` as README.md."""
    found = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    return {**found, CARD: card.encode()}


def push_adapter(
    folder: Path,
    repo: str,
    *,
    card: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
) -> PushedAdapter:
    """Upload an adapter folder as one commit, and create the repository if there is none.

    Args:
        folder: a PEFT folder.
        repo: "OWNER/NAME", or "NAME" for the owner of the token.
        card: content of README.md.
        private: visibility of a new repository; None leaves it to the hub. An existing one keeps its own.
        revision: branch to commit to; created if missing. None is the main branch.
        message: commit message.
        create_pr: open a pull request instead of committing to the branch.
        endpoint: address of the hub; None is the client's own.

    Raises:
        ConfigError: ``repo`` is not a name of a repository.
        ExportError: there is no valid token, the hub cannot be reached or refuses, or it holds other files afterwards.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repo(repo)
    files = files_of(folder, card)
    api = HfApi(endpoint=endpoint, library_name="veneer")
    with _explained(repo, revision):
        full = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(full, branch=revision, exist_ok=True)
        commit = api.create_commit(
            full,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message or f"Upload the adapter {folder.resolve().name}",
            revision=revision,
            create_pr=create_pr,
        )
        found = {file.path: file for file in api.get_paths_info(full, list(files), revision=commit.oid)}
    sizes = {}
    for name, data in files.items():
        sizes[name] = len(data)
        if not _same(found.get(name), data):
            raise ExportError(f"{full}: the hub's {name} differs from the uploaded one; push again")
    url = str(commit.repo_url)
    return PushedAdapter(url, commit.oid, sizes, commit.pr_url)


def _same(file: Any, data: bytes) -> bool:
    """The hub's record of a file describes ``data``: by its SHA-256 if it is stored as a large file, else by its git hash."""
    if file is None or file.size != len(data):
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == hashlib.sha256(data).hexdigest())
    return bool(file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the client's errors into one sentence each."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined] # of the client's own library

    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ExportError(f"{repo}: there is no token for the hub; {login}") from error
    except OfflineModeIsEnabled as error:
        raise ExportError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        said = error.server_message or str(error).strip().splitlines()[0]
        if status in (401, 403):
            raise ExportError(f"{repo}: the hub does not accept this token for writing ({said}); {login}") from error
        at = f" (revision {revision!r})" if revision else ""
        raise ExportError(f"{repo}{at}: the hub answered {status}: {said}") from error
    except (TransportError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if "Name or service not known" in first or "Temporary failure in name resolution" in first:
            first = "the hub cannot be reached; try again with a network"
        raise ExportError(f"{repo}: could not be uploaded: {first}") from error
