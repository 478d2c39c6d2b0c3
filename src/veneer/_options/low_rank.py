"""Options that low-rank methods share, in Python (``LoRA(r=8)``) and in a training run (``--r 8``).

The names are those that PEFT writes into ``adapter_config.json``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from veneer._options.base import Flag, Fraction, Positive
from veneer._options.method import MethodOptions

Rank = Annotated[int, Field(strict=True, ge=1, le=4096)]
Alpha = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1e6)]


class LowRankOptions(MethodOptions):
    """Options of the low-rank methods."""

    title: ClassVar[str] = "Adapter"

    r: Rank = 16
    """Rank. Experts of a mixture get r divided by the number of experts per token, at least 1."""
    lora_alpha: Alpha = 32.0
    """Scaling: the low-rank update is multiplied by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """Dropout probability on the input of the low-rank branch."""
    use_rslora: Flag = False
    """Scale by lora_alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732)."""
    loraplus_lr_ratio: Positive = 1.0
    """Ratio of B's learning rate to A's (LoRA+, arXiv 2402.12354)."""
    init_lora_weights: Literal["kaiming_uniform", "gaussian", "pissa", "olora", "eva"] = "kaiming_uniform"
    """Initialization: A is random and B zero (kaiming_uniform, gaussian), or both are factors of the base weight by its singular values
    (pissa, arXiv 2404.02948) or its QR decomposition (olora, arXiv 2406.01775); the adapter then has rank 2 r, half of it held. eva
    (arXiv 2410.07170): A has the directions of most variance in a layer's inputs on the training rows, and ranks are shared by it."""
    eva_rho: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=1, le=64)] = 2.0
    """Highest rank of a layer with eva, relative to r; 1 keeps all ranks equal."""
    rank_pattern: dict[str, Rank] = {}
    """Ranks of particular modules, by pattern: q_proj=8."""
    alpha_pattern: dict[str, Alpha] = {}
    """lora_alpha of particular modules, by pattern: q_proj=16."""
    shared_outer: Flag = False
    """Let all experts of a stack share the factor on the hidden side: A of gate_proj and up_proj, B of down_proj."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train: none, those of adapted layers only (lora_only), or all."""
    lora_bias: Flag = False
    """Add a bias to B (LoRA only)."""
