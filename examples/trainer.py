"""Train an adapter with transformers' Trainer: `bank.module` is the base under one adapter, as a module.

python examples/trainer.py
"""

from __future__ import annotations

import sys

from transformers import Trainer, TrainingArguments

import veneer
from veneer import LoRA


def main(model: str = "smollm2-135m", out: str = "runs/trainer", steps: int = 10) -> float:
    """Train on a few sentences; returns the mean training loss."""
    base = veneer.load_base(model)
    bank = veneer.attach(base.model)
    bank.add("facts", LoRA(r=8))
    texts = ["roses are red", "the sky is blue", "grass is green", "snow is white"]
    rows = [{"input_ids": ids, "labels": ids} for ids in (base.tokenizer(text).input_ids[:4] for text in texts)]
    arguments = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trained = Trainer(bank.module("facts"), arguments, train_dataset=rows).train()
    bank.save("facts", f"{out}/adapter")
    print(f"mean loss {trained.training_loss:.3f}, adapter in {out}/adapter")
    return float(trained.training_loss)


if __name__ == "__main__":
    main(*sys.argv[1:3])
