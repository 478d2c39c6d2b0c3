"""The operations that take most of the time of a step on Qwen3-1.7B's shape."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from bench.device.steps import RANK, job_of, place_of, trainer_of
from bench.device.supervise import Row, Setting, figure
from veneer.adapters import DoRA, LoRA
from veneer.checkpoints import attach
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.flat import FlatRunner
from veneer.training.loop.step import Stepper

_SHOWN = 25


def run(setting: Setting) -> Iterator[Row]:
    """The largest shares for LoRA and for DoRA."""
    place = place_of("qwen", setting)
    on_gpu = place.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for method in (LoRA(r=RANK),) if setting.tiny else (LoRA(r=RANK), DoRA(r=RANK)):
        bank = attach(place.model)
        bank.add("job", method)
        use_fast_forwards(place.model)
        trainer = trainer_of(
            Stepper(FlatRunner(place.model), bank), [job_of(bank, "job", place.rows)], sum(map(len, place.rows))
        )
        for _ in range(2):
            trainer.round()
        with profile(activities=kinds) as found:
            trainer.round()
            if on_gpu:
                torch.cuda.synchronize(place.device)
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
        total = sum(getattr(event, key) for event in events)
        for event in events[: 5 if setting.tiny else _SHOWN]:
            share = round(100 * getattr(event, key) / total, 2)
            yield figure(
                f"{method.label}: {event.key[:60]}",
                share,
                "%",
                calls=event.count,
                ms=round(getattr(event, key) / 1e3, 3),
            )
        bank.detach()
