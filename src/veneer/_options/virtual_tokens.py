"""Options of methods that put virtual tokens before the sequence."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from veneer._options.method import MethodOptions


class VirtualTokenOptions(MethodOptions):
    """Options of the methods that add virtual tokens."""

    title: ClassVar[str] = "Adapter"

    num_virtual_tokens: Annotated[int, Field(strict=True, ge=1, le=4096)] = 20
    """Number of virtual tokens before the sequence (prompt, prefix)."""
