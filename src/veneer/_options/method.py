"""Options that all adapter methods share: the layers that an adapter acts on, and what is trained in full beside its change.

The names are those that PEFT writes into ``adapter_config.json``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from veneer._options.base import Flag, Options, Texts, Whole


class MethodOptions(Options):
    """Options of all adapter methods."""

    title: ClassVar[str] = "Adapter"

    target_modules: Literal["all-linear", "all", "auto"] | Texts = "all-linear"
    """Modules to adapt: all linear layers of the blocks (without the head), all layers, auto (those of the method's paper), or
    names, globs, and regular expressions after re:."""
    exclude_modules: Texts = ()
    """Modules to leave out, given in the same way."""
    layers_to_transform: tuple[Whole, ...] | None = None
    """Indices of the blocks to adapt, from 0 (default: all)."""
    ensure_weight_tying: Flag = False
    """Let an adapter on a tied embedding adapt the head with the same factors."""
    modules_to_save: Texts = ()
    """Modules to train in full and save with the adapter, by name: a head (lm_head, score), an embedding, norms."""
    trainable_token_indices: tuple[Whole, ...] = ()
    """Token ids whose embedding rows are trained and saved with the adapter."""
