"""The options that low-rank methods share, in Python (``LoRA(r=8)``) and in a training run (``--r 8``).

Names are the field's own, as PEFT writes them into ``adapter_config.json``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from veneer._options.base import Flag, Fraction, Options, Positive, Texts, Whole

Rank = Annotated[int, Field(strict=True, ge=1, le=4096)]
Alpha = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1e6)]


class LowRankOptions(Options):
    """The adapter."""

    r: Rank = 16
    """Rank of the change at each site."""
    lora_alpha: Alpha = 32.0
    """The change is scaled by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """Chance that an input of the low-rank branch is dropped in training."""
    use_rslora: Flag = False
    """Scale by lora_alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732)."""
    loraplus_lr_ratio: Positive = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354)."""
    init_lora_weights: Literal["kaiming_uniform", "gaussian"] = "kaiming_uniform"
    """How A starts; B is zero, so that training begins at the base."""
    target_modules: Literal["all-linear"] | Texts = "all-linear"
    """Where the adapter acts: all linear layers of the blocks (not the head), or names, globs and patterns after re:."""
    exclude_modules: Texts = ()
    """Sites to leave out, in the same words."""
    layers_to_transform: tuple[Whole, ...] | None = None
    """Only these blocks, counted from 0; none means all."""
    rank_pattern: dict[str, Rank] = {}
    """Another r for some sites, by pattern: q_proj=8."""
    alpha_pattern: dict[str, Alpha] = {}
    """Another lora_alpha for some sites, by pattern: q_proj=16."""
    ensure_weight_tying: Flag = False
    """Let an adapter on a tied embedding act on the head too, through the same factors."""
    modules_to_save: Texts = ()
    """Layers to train whole, as the adapter's own: a head (lm_head, score), an embedding, norms; by name."""
    trainable_token_indices: tuple[Whole, ...] = ()
    """Tokens whose embeddings are trained, as the adapter's own; only these rows are kept."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train, as the adapter's own: those of adapted layers only, or all."""
    lora_bias: Flag = False
    """Give B a bias (LoRA only)."""
