"""Resolve the name of a base to a folder of safetensors or a GGUF file.

    "smollm2-135m"          the embedded default; "minilm-l6" is an encoder
    "some/folder"           config.json and safetensors; or a folder with one .gguf file
    "some/file.gguf"
    "organisation/model"    a Hub id, through the Hub's client (HF_HUB_OFFLINE and HF_HOME apply)

Local files take precedence over a Hub id. Models that need their own code and weights in pickles are refused.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import BaseModelError, VeneerError
from veneer.models.embedded import EMBEDDED, find_embedded

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class Source:
    """The files of a base: ``path`` is a folder with config.json and safetensors, or, if ``gguf``, a GGUF file."""

    path: Path
    gguf: bool
    alias: str | None = None


def resolve(name: str, revision: str | None = None) -> Source:
    """Find the files behind ``name``.

    Raises:
        BaseModelError: nothing is there, or what is there cannot be loaded safely; with what was found and the
        remedy.
    """
    text = os.fspath(name).strip()
    if not text:
        raise BaseModelError("the base's name is empty; give a folder, a .gguf file, a hub id or 'smollm2-135m'")
    path = Path(text).expanduser()
    if text.lower() in EMBEDDED and not path.exists():
        alias = text.lower()
        found = find_embedded(alias)
        return Source(found, gguf=found.suffix == ".gguf", alias=alias)
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_folder(path)
    if looks_like_path(text):
        raise BaseModelError(
            f"the base {text!r} is neither a file nor a folder here (looked for {path.absolute()}); "
            f"check the spelling, or give a hub id such as organisation/model"
        )
    return _from_folder(_download(text, revision), hub_id=text)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json; raises BaseModelError where it is not a JSON object."""
    return json_object(folder / "config.json")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's generation_config.json, empty without one; raises BaseModelError where it is not a JSON object."""
    file = folder / "generation_config.json"
    return json_object(file) if file.is_file() else {}


def json_object(file: Path, error: type[VeneerError] = BaseModelError) -> dict[str, Any]:
    """The content of a JSON file; raises ``error`` where it cannot be read or is not an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as problem:
        raise error(f"{file} cannot be read as JSON: {problem}; get the file again") from problem
    if not isinstance(content, dict):
        raise error(f"{file}: expected a JSON object, found {type(content).__name__}; get the file again")
    return content


def looks_like_path(text: str) -> bool:
    return text.startswith((".", "~", "/", "\\")) or text.lower().endswith(".gguf") or not _HUB_ID.fullmatch(text)


def _from_file(path: Path) -> Source:
    if path.suffix.lower() == ".gguf":
        return Source(path, gguf=True)
    if path.suffix.lower() == ".safetensors" or path.name == "config.json":
        raise BaseModelError(f"the base {path} is one file of a model's folder; give the folder: {path.parent}")
    raise BaseModelError(
        f"the base {path} is a file of a kind that cannot be loaded; expected a folder with config.json and "
        f"safetensors, or a .gguf file"
    )


def _from_folder(folder: Path, hub_id: str | None = None) -> Source:
    where = f"the hub's model {hub_id!r}" if hub_id else f"the folder {folder}"
    ggufs = sorted(folder.glob("*.gguf"))
    has_config = (folder / "config.json").is_file()
    has_weights = any(folder.glob("*.safetensors"))
    if not has_config and (folder / "adapter_config.json").is_file():
        raise BaseModelError(_is_adapter(where, folder))
    if has_config and has_weights:
        _refuse_remote_code(where, folder)
        return Source(folder, gguf=False)
    if len(ggufs) == 1:
        return Source(ggufs[0], gguf=True)
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs)
        raise BaseModelError(f"{where} holds several GGUF files ({names}); give the one that you mean")
    raise BaseModelError(_what_is_missing(where, folder, has_config, hub_id))


def _is_adapter(where: str, folder: Path) -> str:
    base = "the base that it was trained on"
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8-sig")).get(
            "base_model_name_or_path"
        )
        base = repr(found) if isinstance(found, str) and found else base
    except (OSError, ValueError, AttributeError):
        pass
    return f"{where} holds an adapter, not a base model; give {base} as the base, and this folder as the adapter"


def _what_is_missing(where: str, folder: Path, has_config: bool, hub_id: str | None) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if not has_config:
        inner = sorted(file.parent.name for file in folder.glob("*/config.json"))
        hint = f"; did you mean the folder {inner[0]} in it?" if inner else "; give the folder of a model"
        return f"{where} has no config.json, so it holds no model that can be loaded{hint}"
    if pickles:
        return (
            f"{where} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run code while they are "
            f"read and are never loaded; convert them to safetensors"
        )
    found = "only files of other formats (pickles, GGUF or none at all)" if hub_id else "none"
    return (
        f"{where} has a config.json and no weights: expected *.safetensors, found {found}; get the weights, or see what would fit with "
        f"veneer plan --base {hub_id or folder} --memory 24GB"
    )


def _refuse_remote_code(where: str, folder: Path) -> None:
    from transformers import CONFIG_MAPPING

    config = read_config(folder)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if config.get("auto_map"):
        raise BaseModelError(
            f"{where} needs Python code that comes with its weights (model type {kind!r}), and such code is never run; "
            f"choose a model that transformers knows by itself"
        )
    import transformers

    raise BaseModelError(
        f"{where} has the model type {kind!r}, which transformers {transformers.__version__} does not know; "
        f"update transformers, or check the config.json"
    )


def fetch_config(name: str, revision: str | None) -> Path:
    """A folder with the config.json of a hub model, from the local hub cache or the network."""
    return _download(name, revision, ["config.json"])


def _download(name: str, revision: str | None, files: list[str] = _HUB_FILES) -> Path:
    """A hub model's files, from the local hub cache or the network; only safetensors weights are fetched."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    local = "give a folder on this disk, or 'smollm2-135m', which needs no network"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["*/*", "*.bin"]))
    except GatedRepoError as error:
        raise BaseModelError(
            f"the hub's model {name!r} is gated; accept its terms on its page, log in with the hub's client, try again"
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(f"the hub's model {name!r} has no revision {revision!r}; check its name") from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"the base {name!r} is neither a folder here nor a public model on the hub; check the spelling, or {local}"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise BaseModelError(
            f"the base {name!r}{at} is neither a folder here nor in the local hub cache, and {why}; {local}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(f"the base {name!r}{at} could not be fetched from the hub: {first}; {local}") from error
