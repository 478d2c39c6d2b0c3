"""Tiny engines with several adapters, and random traces of requests over them, for tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tests.tiny import VOCAB, tiny, tiny_tokenizer
from torch import nn

from veneer import DoRA, LoRA
from veneer.checkpoints import attach
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.state import quantize
from veneer.serve.engine.engine import Engine, EngineLimits
from veneer.serve.engine.request import Event, Finished, GenerationRequest, Mix, SamplingParams, TextDelta


def randomised(bank: Any, name: str, seed: int) -> None:
    """Give an adapter's tensors values that change the output."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank[name].requires_grad_(False).parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))


def model_of(arch: str, format: str | None = None, **overrides: Any) -> Any:
    """A tiny model, the linear layers of its blocks quantized where a format is given."""
    model = tiny(arch, **overrides)
    for block in model.model.layers if format else ():
        for parent in (block.self_attn, block.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    weight = quantize(module.weight.detach(), str(format))
                    setattr(parent, name, QuantizedLinear(weight, module.bias, module.weight.dtype))
    return model


def folders(root: Path, count: int, arch: str = "llama", **overrides: Any) -> list[Path]:
    """Folders of adapters with different methods, ranks and targets."""
    bank = attach(model_of(arch, **overrides))
    methods = [
        LoRA(r=4, target_modules=["q_proj", "v_proj"]),
        DoRA(r=8),
        LoRA(r=2, use_rslora=True),
        DoRA(r=3, target_modules=["down_proj", "o_proj"]),
    ]
    found = []
    for number in range(count):
        bank.add(f"a{number}", methods[number % len(methods)], seed=number)
        randomised(bank, f"a{number}", number)
        bank.save(f"a{number}", root / f"a{number}")
        found.append(root / f"a{number}")
    return found


def engine(arch: str = "llama", limits: EngineLimits | None = None, **overrides: Any) -> Engine:
    """An engine on a tiny model with an empty bank."""
    model = model_of(arch, **overrides)
    return Engine(model, tiny_tokenizer(), attach(model), limits or EngineLimits(context=128))


def request(number: int, mix: Mix, draw: random.Random, **params: Any) -> GenerationRequest:
    """A random prompt, with one of three common beginnings."""
    shared = [list(range(7 * k, 7 * k + 24)) for k in range(3)][draw.randrange(3)]
    prompt = shared[: draw.randrange(1, 25)] + [draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 12))]
    seeded = {"temperature": 0.9, "top_p": 0.9, "seed": number} if draw.random() < 0.5 else {}
    sampling = SamplingParams(**{"max_tokens": draw.randrange(1, 12), "ignore_eos": True, **seeded, **params})
    return GenerationRequest(f"r{number}", tuple(prompt), mix, sampling)


def tokens(events: list[Event]) -> list[int]:
    """The tokens of an answer."""
    return [token for event in events if isinstance(event, TextDelta) for token in event.tokens]


def answer(made: Engine, one: GenerationRequest) -> list[int]:
    """Run a request alone, in this thread."""
    events = list(made.run(one))
    assert isinstance(events[-1], Finished) and events[-1].error is None, events[-1]
    return tokens(events)
