"""Veneer: one frozen base, many LoRA and DoRA adapters, trained, mixed, composed and served on it.

    import veneer
    from veneer import LoRA, DoRA

    base = veneer.load_base("smollm2-135m")
    bank = veneer.attach(base.model)
    bank.add("sql", LoRA(r=16, lora_alpha=32))
    with bank.use("sql"):
        base.model(**batch)

Names resolve when they are first used, so that ``import veneer`` and ``veneer --help`` cost nothing.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from veneer._version import __version__ as __version__

if TYPE_CHECKING:
    from veneer import errors
    from veneer.adapters import (
        IA3,
        Adapter,
        Bank,
        BitFit,
        DoRA,
        Full,
        Houlsby,
        LoRA,
        Pfeiffer,
        PrefixTuning,
        PromptTuning,
        Route,
        VeRA,
        bank_of,
    )
    from veneer.checkpoints import attach
    from veneer.models.load import Base, load_base
    from veneer.training import train

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # GNU OpenMP reads it when torch is loaded. By default a waiting thread spins for milliseconds on a processor that a busy process
    # needs, and a step takes seven times as long. This count costs nothing on a quiet machine; sleeping at once does
    # (docs/log/kernels.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

__all__ = [
    "IA3",
    "Adapter",
    "Bank",
    "Base",
    "BitFit",
    "DoRA",
    "Full",
    "Houlsby",
    "LoRA",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "Route",
    "VeRA",
    "attach",
    "bank_of",
    "errors",
    "load_base",
    "train",
]

_HOMES = {
    "Adapter": "veneer.adapters",
    "Bank": "veneer.adapters",
    "Base": "veneer.models.load",
    "BitFit": "veneer.adapters",
    "DoRA": "veneer.adapters",
    "Full": "veneer.adapters",
    "Houlsby": "veneer.adapters",
    "IA3": "veneer.adapters",
    "LoRA": "veneer.adapters",
    "Pfeiffer": "veneer.adapters",
    "PrefixTuning": "veneer.adapters",
    "PromptTuning": "veneer.adapters",
    "Route": "veneer.adapters",
    "VeRA": "veneer.adapters",
    "attach": "veneer.checkpoints",
    "bank_of": "veneer.adapters",
    "load_base": "veneer.models.load",
    "train": "veneer.training",
}


if not TYPE_CHECKING:  # else every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name == "errors":
            return import_module("veneer.errors")
        if name not in _HOMES:
            raise AttributeError(f"module 'veneer' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
