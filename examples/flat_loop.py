"""Write the training loop yourself on `forward_backward` and `optim_step`, with two jobs in every batch.

python examples/flat_loop.py
"""

from __future__ import annotations

import sys

import veneer
from veneer import LoRA
from veneer.config import TrainOptions
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.models.flat import FlatRunner
from veneer.training.loop.job import Job
from veneer.training.loop.step import Stepper


def examples_of(base: veneer.Base, texts: list[str]) -> list[Example]:
    """Token ids with a weight per token; the first token has nothing that predicts it."""
    found = []
    for text in texts:
        ids = tuple(base.tokenizer(text).input_ids)
        found.append(Example(ids, (0.0, *[1.0] * (len(ids) - 1)), text))
    return found


def main(model: str = "smollm2-135m", steps: int = 10) -> dict[str, list[float]]:
    """Train two adapters side by side; returns the loss of every step by job."""
    base = veneer.load_base(model)
    bank = veneer.attach(base.model)
    data = {
        "red": examples_of(base, ["roses are red", "cherries are red"]),
        "blue": examples_of(base, ["the sky is blue today", "the sea is blue"]),
    }
    jobs = []
    for name, examples in data.items():
        bank.add(name, LoRA(r=8))
        options = TrainOptions(data=("in memory",), batch_size=2, warmup_steps=0)
        jobs.append(Job(name, options, bank, examples, (), peak=1e-3, steps=steps))
    stepper = Stepper(FlatRunner(base.model), bank)
    losses: dict[str, list[float]] = {job.name: [] for job in jobs}
    for _ in range(steps):
        taken = [(job.name, example) for job in jobs for example in job.next_examples()]
        batch = make_batch([example for _, example in taken], [name for name, _ in taken])
        for name, found in stepper.forward_backward(batch).items():
            job = next(job for job in jobs if job.name == name)
            job.add(found)
            losses[name].append(job.optim_step()["loss"])
    for name, values in losses.items():
        print(f"{name}: {values[0]:.3f} -> {values[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
