"""Checkpoints: PEFT folders in and out, with receipts that loading verifies."""

from __future__ import annotations

from veneer.checkpoints.peft.folders import PeftFolders, attach, read_adapter, write_adapter

__all__ = ["PeftFolders", "attach", "read_adapter", "write_adapter"]
