"""Decoding many rows on many adapters in the engine, beside base rows, and the same through PEFT's adapter_names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from tests.tiny import tiny_tokenizer

from bench.device.clock import seconds, wait
from bench.device.shapes import made
from bench.device.supervise import Row, Setting, check, figure
from veneer.adapters import Bank, LoRA
from veneer.checkpoints import attach
from veneer.models.fast_modules import use_fast_forwards
from veneer.serve.engine.engine import Engine, EngineLimits
from veneer.serve.engine.request import GenerationRequest, Mix, SamplingParams

RANK = 16


def run(setting: Setting) -> Iterator[Row]:
    """Base rows, mixed rows, and PEFT."""
    device = torch.device(setting.device)
    rows, adapters, steps = (4, 2, 3) if setting.tiny else (64, 16, 24)
    model = made("qwen", setting)
    bank = attach(model)
    draw = torch.Generator().manual_seed(0)
    for number in range(adapters):
        for _, key, parameter in (
            bank.add(f"a{number}", LoRA(r=RANK), seed=number).requires_grad_(False).named_tensors()
        ):
            if key == "lora_B":
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
    names = [f"a{i % adapters}" for i in range(rows)]
    prompt = torch.arange(3, 35, device=device).expand(rows, -1)
    with torch.no_grad(), bank.use(names):
        ours = model(input_ids=prompt, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
    use_fast_forwards(model)
    engine = Engine(model, tiny_tokenizer(), bank, EngineLimits(context=256, cache_tokens=rows * 128))
    plain = _seconds(engine, [()] * rows, steps, device)
    yield figure(f"{rows} base rows", round(rows / plain, 1), "tokens/s", runner=type(engine.runner).__name__)
    mixed = _seconds(engine, [((name, 1.0),) for name in names], steps, device)
    yield figure(
        f"{rows} rows on {adapters} adapters over base rows",
        round(mixed / plain, 3),
        "x",
        tokens_per_second=round(rows / mixed, 1),
    )
    del engine
    yield from _peft(model, bank, names, prompt, ours, steps, device, setting)


def _seconds(engine: Engine, mixes: list[Mix], steps: int, device: torch.device) -> float:
    """The time of a decoding step."""
    for number, mix in enumerate(mixes):
        sampling = SamplingParams(max_tokens=steps + 6, ignore_eos=True)
        engine.submit(GenerationRequest(f"{len(mix)}-{number}", tuple(range(3, 35)), mix, sampling))
    for _ in range(4):
        engine.step()
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    wait(device)
    took = (time.perf_counter() - began) / steps
    while engine.step():
        pass
    return took


@torch.no_grad()
def _peft(
    model: Any,
    bank: Bank,
    names: list[str],
    prompt: torch.Tensor,
    ours: torch.Tensor,
    steps: int,
    device: torch.device,
    setting: Setting,
) -> Iterator[Row]:
    from peft import LoraConfig, get_peft_model

    tensors = {name: bank[name].tensors for name in bank.names}
    bank.detach()
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear")
    theirs: Any = get_peft_model(model, config, adapter_name="a0").eval()
    for name in list(tensors)[1:]:
        theirs.add_adapter(name, config)
    for name, sites in tensors.items():
        for site, own in sites.items():
            layer = theirs.base_model.model.get_submodule(site)
            for key, value in own.items():
                getattr(layer, key)[name].weight.data.copy_(value)
    found = (
        theirs(input_ids=prompt, adapter_names=names, use_cache=False, logits_to_keep=1)
        .logits[:, -1]
        .float()
        .log_softmax(-1)
    )
    yield check(
        "largest difference of log-probabilities from PEFT",
        float((found - ours).abs().max()),
        1e-4 if setting.tiny else 0.2,
    )
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    took = seconds(
        lambda: theirs.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), adapter_names=names, **options
        ),
        device,
        rounds=1,
        warm=1,
    )
    yield figure(f"PEFT's adapter_names, {len(names)} rows", round(len(names) * steps / took, 1), "tokens/s")
