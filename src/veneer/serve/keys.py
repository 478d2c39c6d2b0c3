"""Keys of a server: from the environment, a file, or made at the first start. Only their hashes are kept in memory."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer._files import decode
from veneer.errors import ConfigError

API, ADMIN = "VENEER_API_KEY", "VENEER_ADMIN_KEY"
Role = Literal["user", "admin"]
_SHORTEST = 8


@dataclass(frozen=True)
class Keys:
    """Hashes of the keys. ``source`` says where the keys are, for the start screen."""

    user: bytes
    admin: bytes
    source: str

    def role(self, key: str) -> Role | None:
        """The role of a key, in a time that does not depend on the key; None if it is not a key of this server."""
        given = _hashed(key)
        admin, user = hmac.compare_digest(given, self.admin), hmac.compare_digest(given, self.user)
        return "admin" if admin else "user" if user else None

    def caller(self, key: str) -> str:
        """A name for the owner of a key that does not reveal it."""
        return _hashed(key).hex()[:32]


def read_keys(environment: Mapping[str, str], file: Path | None, made: Path) -> Keys:
    """The keys of a server.

    Args:
        environment: may hold VENEER_API_KEY and VENEER_ADMIN_KEY.
        file: a file with the lines ``VENEER_API_KEY=...`` and ``VENEER_ADMIN_KEY=...``.
        made: where keys are written that are given in neither; only its owner can read it.

    Raises:
        ConfigError: the file cannot be read, or a key is too short.
    """
    given = _from_file(file) if file is not None else {}
    found = {name: environment.get(name) or given.get(name) or "" for name in (API, ADMIN)}
    missing = [name for name in (API, ADMIN) if not found[name]]
    sources = [] if len(missing) == 2 else [str(file)] if file is not None else ["the environment"]
    if missing:
        stored = _from_file(made) if made.is_file() else {}
        fresh = {name: stored.get(name) or f"veneer-{secrets.token_urlsafe(24)}" for name in missing}
        if any(name not in stored for name in missing):
            _write(made, {**stored, **fresh})
        found |= fresh
        sources.append(str(made))
    for name, key in found.items():
        if len(key) < _SHORTEST or any(letter.isspace() for letter in key) or not key.isascii():
            raise ConfigError(f"{name}: expected at least {_SHORTEST} ASCII characters without spaces")
    if found[API] == found[ADMIN]:
        raise ConfigError(f"{API} and {ADMIN} are the same; give two different keys")
    return Keys(_hashed(found[API]), _hashed(found[ADMIN]), " and ".join(sources))


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _from_file(file: Path) -> dict[str, str]:
    try:
        lines = decode(file.read_bytes()).splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the keys in {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, key = line.partition("=")
        if not equals or name.strip() not in (API, ADMIN):
            raise ConfigError(f"{file}, line {number}: expected {API}=KEY or {ADMIN}=KEY")
        found[name.strip()] = key.strip().strip("\"'")
    return found


def _write(file: Path, keys: Mapping[str, str]) -> None:
    file.unlink(missing_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.writelines(f"{name}={key}\n" for name, key in keys.items())
