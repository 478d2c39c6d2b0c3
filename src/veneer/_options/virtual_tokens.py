"""Options of methods that put virtual tokens before the sequence."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from veneer._options.method import MethodOptions


class VirtualTokenOptions(MethodOptions):
    """Adapter."""

    num_virtual_tokens: Annotated[int, Field(strict=True, ge=1, le=4096)] = 20
    """Number of virtual tokens before the sequence (prompt, prefix)."""
