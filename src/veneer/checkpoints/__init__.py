"""Checkpoints: PEFT folders in and out, with receipts that loading verifies. Names resolve when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.checkpoints.peft.folders import PeftFolders, attach, read_adapter, write_adapter

__all__ = ["PeftFolders", "attach", "read_adapter", "write_adapter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from veneer.checkpoints.peft import folders

    return getattr(folders, name)
