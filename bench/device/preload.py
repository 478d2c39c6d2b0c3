"""Imports for the process from which stages are forked. Nothing here may open a device."""

from __future__ import annotations

import veneer  # noqa: F401  # isort: skip  (before torch, as in a command: it limits how long OpenMP's threads spin)

from contextlib import suppress

import torch
from transformers import LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from bench.device import ceilings, correctness, decoding, profiling, steps, steps_llama, sweeps, together

__all__ = ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"]
__all__ += ["ceilings", "correctness", "decoding", "profiling", "steps", "steps_llama", "sweeps", "together"]
with suppress(ImportError):
    import peft  # noqa: F401
assert not torch.cuda.is_initialized()
