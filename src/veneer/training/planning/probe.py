"""The time of a training pass on each precision of a base, measured on random tokens, for the table of settings that fit.

It needs the weights on this machine. The times are this machine's, and hold for a run on one like it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.methods import LOW_RANK
from veneer.checkpoints import attach
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.errors import BaseModelError
from veneer.models.devices import device_of, wait_for
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base
from veneer.models.quantized.scheme import Scheme, read_scheme
from veneer.models.sources import read_config
from veneer.training.activation_checkpointing import activation_checkpointing, layers_of
from veneer.training.cpp_kernels import use_cpp_kernels
from veneer.training.loop.step import Stepper
from veneer.training.planning.fitting import PRECISIONS

__all__ = ["LARGEST", "Times", "measure_times"]

LARGEST = 1_500_000_000
"""Parameters up to which a base is measured: reading it and its passes take at most about a minute."""
_TOKENS = 256

Times = dict[tuple[str, int, bool], float]
"""(precision, rank, with activation checkpointing) -> seconds for 1,000 tokens."""


def measure_times(folder: Path, method: str, ranks: Sequence[int], device: str | torch.device = "auto") -> Times:
    """Measure forward and backward of each precision, rank, with and without activation checkpointing.

    A base whose files are quantized is measured in their format alone.
    """
    stored = read_scheme(read_config(folder), folder)
    held = stored.format if isinstance(stored, Scheme) else None
    use_cpp_kernels()
    found: Times = {}
    for precision in PRECISIONS if held is None else (held,):
        try:
            base = load_base(
                folder, dtype="bfloat16", device=device, quantize=None if precision == "bfloat16" else precision
            )
        except BaseModelError:  # this format cannot be had from these files: its rows have no time
            continue
        found |= _times(base.model, precision, method, ranks)
    return found


def _times(model: Any, precision: str, method: str, ranks: Sequence[int]) -> Times:
    bank = attach(model)
    use_fast_forwards(model)
    stepper = Stepper(FlatRunner(model), bank)
    ids = torch.randint(0, int(model.get_input_embeddings().weight.shape[0]), (_TOKENS,)).tolist()
    example = Example(tuple(ids), (0.0, *[1.0] * (_TOKENS - 1)), "random")
    found: Times = {}
    for r in ranks:
        name = f"r{r}"
        bank.add(name, LOW_RANK[method](r=r))
        for again in (False, True) if layers_of(model) else (False,):
            with activation_checkpointing(model, again):
                taken = []
                for _ in range(3):  # the first pass makes what later ones find
                    began = time.perf_counter()
                    stepper.forward_backward(make_batch([example], [name]))
                    wait_for(device_of(model))
                    taken.append(time.perf_counter() - began)
                found[precision, r, again] = min(taken[1:]) * 1000 / _TOKENS
        bank.remove(name)
    return found
