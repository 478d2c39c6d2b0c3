"""Adapters: sites, layer kinds, methods, routes and the bank that holds them together.

Needs torch and pydantic only: it works on any ``nn.Module``.
"""

from __future__ import annotations

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach, bank_of
from veneer.adapters.bank import Bank
from veneer.adapters.methods import (
    IA3,
    METHODS,
    BitFit,
    DoRA,
    Full,
    Houlsby,
    LoRA,
    Method,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    VeRA,
)
from veneer.adapters.runtime.route import Route

__all__ = [
    "IA3",
    "METHODS",
    "Adapter",
    "Bank",
    "BitFit",
    "DoRA",
    "Full",
    "Houlsby",
    "LoRA",
    "Method",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "Route",
    "VeRA",
    "attach",
    "bank_of",
]
