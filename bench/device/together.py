"""Many small jobs on one base: all in shared passes, and in turn."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from bench.device.clock import in_turn
from bench.device.shapes import made, row
from bench.device.steps import job_of, trainer_of
from bench.device.supervise import Row, Setting, figure
from veneer.adapters import DoRA, LoRA
from veneer.checkpoints import attach
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.flat import FlatRunner
from veneer.training.loop.step import Stepper


def run(setting: Setting) -> Iterator[Row]:
    """1, 8 and 32 jobs of 256 and 1,024 tokens."""
    model = made("qwen", setting)
    bank = attach(model)
    for number in range(4 if setting.tiny else 32):
        bank.add(f"job{number}", (DoRA if number % 2 else LoRA)(r=16), seed=number)
    use_fast_forwards(model)
    stepper, device = Stepper(FlatRunner(model), bank), torch.device(setting.device)
    for tokens in (8,) if setting.tiny else (256, 1024):
        draw = random.Random(0)
        for count in (4,) if setting.tiny else (1, 8, 32):
            rows = {name: [row(draw, tokens, model.config.vocab_size, 0)] for name in bank.names[:count]}
            jobs = [job_of(bank, name, own) for name, own in rows.items()]
            trainers = {
                "together": trainer_of(stepper, jobs, tokens, 8192 if not setting.tiny else 128),
                "in turn": trainer_of(stepper, jobs, tokens),
            }
            took = in_turn({key: one.round for key, one in trainers.items()}, device, rounds=2 if setting.tiny else 4)
            speeds = {key: round(count * tokens / value, 1) for key, value in took.items()}
            ratio = round(took["in turn"] / took["together"], 3)
            yield figure(
                f"{count} jobs of {tokens} tokens, in turn over together", ratio, "x", tokens_per_second=speeds
            )
