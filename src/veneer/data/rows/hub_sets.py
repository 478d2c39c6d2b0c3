"""Data sets of the hub, through the package ``datasets``: its cache, HF_HOME, HF_HUB_OFFLINE and login apply.

    organisation/name                   its split train (and validation, where the held-out rows are not given)
    organisation/name:test              another split, or a part of one: train[:1000]
    organisation/name/config:train      a set with several configurations

What is on this disk goes before the hub. No code of a data set runs: ``datasets`` reads files of rows only, from version 4 on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*?)(?:/(?P<config>\w[\w.-]*))?(?::(?P<split>\w+(?:\[[\d:%-]*\])?))?")
_OF_FILES = re.compile(r"\.(jsonl|json|csv|tsv|parquet|txt|ya?ml|gz|html)$", re.I)


@dataclass(frozen=True)
class HubSet:
    """The name of a data set, one of its configurations, and a split; None for those that are not given."""

    name: str
    config: str | None
    split: str | None

    def __str__(self) -> str:
        return self.name + (f"/{self.config}" if self.config else "") + (f":{self.split}" if self.split else "")

    def rows(self) -> Dataset:
        """The rows of its split, or of train. Raises DataError."""
        found = _load(self)
        if self.split is None and "train" not in found:
            raise DataError(f"{self}: it has no split train; give one of {self}:{f', {self}:'.join(found)}")
        return found if self.split else found["train"]

    def splits(self) -> list[str]:
        """The names of all splits, or its own. Raises DataError."""
        return [self.split] if self.split else list(_load(self))


def hub_set(path: Path) -> HubSet | None:
    """The data set of the hub that a path names; None if something is at the path, or it does not read as such a name."""
    text = path.as_posix()
    found = _NAME.fullmatch(text)
    first = Path(text.partition("/")[0])
    if found is None or _OF_FILES.search(text) or os.path.lexists(path) or first.is_dir():
        return None
    return HubSet(found["name"], found["config"], found["split"])


@functools.lru_cache(maxsize=8)
def _load(wanted: HubSet) -> Any:
    """The rows of a split, or all splits by name."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{wanted}: no such file; if it is a data set of the hub, run: pip install 'veneer[datasets]'"
        ) from None
    why = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else "the hub cannot be reached"
    try:
        with _offline_without_network(datasets.config):
            return datasets.load_dataset(wanted.name, wanted.config, split=wanted.split)
    except datasets.exceptions.DatasetNotFoundError:
        raise DataError(
            f"{wanted}: no such file, and the hub gives out no data set of that name; check the spelling, or log in with hf auth login "
            "if it is private"
        ) from None
    except ConnectionError:
        raise DataError(f"{wanted}: no such file, and no data set of that name in the local cache; {why}") from None
    except Exception as error:  # a data set of the hub may be damaged in any way
        reason = " ".join(" ".join(str(error).split("\n")[:2]).split())[:300] or type(error).__name__
        hint = f"; write it as {wanted.name}/CONFIG" if "onfig name is missing" in reason else ""
        raise DataError(f"{wanted}: cannot read the data set of the hub: {reason}{hint}") from error


@contextlib.contextmanager
def _offline_without_network(config: Any) -> Iterator[None]:
    """Inside this context, ``datasets`` reads its cache only if the hub's name has no address: it would ask again for half a minute."""
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    before = config.HF_HUB_OFFLINE
    try:
        if host and not urllib.request.getproxies():
            socket.getaddrinfo(host, None)
    except OSError:
        config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
