"""The base, its bank and its engine, as the options of ``veneer serve`` describe them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from veneer._terminal import note
from veneer.adapters import Bank
from veneer.checkpoints import attach
from veneer.models.devices import resolve_device
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.load import Base, load_base
from veneer.models.precision import fast_dtype
from veneer.serve.engine.engine import Engine, EngineLimits
from veneer.serve.runner_record import record_of
from veneer.training.cpp_kernels import use_cpp_kernels


@dataclass(frozen=True)
class EngineOptions:
    """Options of a base that serves.

    Attributes:
        base, dtype, device: the base model, its dtype or "auto", and its device or "auto".
        quantize: the format that the base is quantized to, or None.
        adapters: folder of adapters and runs, or None.
        limits: limits of the engine.
    """

    base: str
    dtype: str = "auto"
    device: str = "auto"
    quantize: str | None = None
    adapters: Path | None = None
    limits: EngineLimits = field(default_factory=EngineLimits)


def load_served_base(options: EngineOptions) -> tuple[Base, Bank]:
    """The base with its bank."""
    device, dtype = resolve_device(options.device), options.dtype
    if dtype == "auto":
        dtype = str(fast_dtype(device, "generate")).removeprefix("torch.")
    base = load_base(options.base, dtype=dtype, device=device, quantize=options.quantize)
    bank = attach(base.model)
    if device.type == "cpu":
        use_cpp_kernels(note)
    use_fast_forwards(base.model)
    return base, bank


def load_engine(options: EngineOptions) -> tuple[Base, Bank, Engine]:
    """The base with its bank and an engine on it."""
    base, bank = load_served_base(options)
    return base, bank, Engine(base.model, base.tokenizer, bank, options.limits, record=record_of(base))
