"""TRL's SFTTrainer with PEFT, stopped after every step of its loop.

Matched: the base in the same dtype, the same first adapter, rows in order, no checkpointing, a constant learning rate. The form "shipped":
the defaults of ``SFTTrainer(model, args, train_dataset, peft_config)`` on the same tokenized rows.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.workers.plain import LEARNING_RATE, load
from bench.workers.turn import Turn


class _InOrder(SFTTrainer):  # type: ignore[misc]
    """Takes rows in order and keeps the loss of the last step."""

    loss = float("nan")

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset if dataset is None else dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        self.loss = float((found[0] if isinstance(found, tuple) else found).detach())
        return found


class _Stops(TrainerCallback):  # type: ignore[misc]
    """Waits for the next request between two steps."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.trainer: Any = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Answer and wait. Collating rows counts to the next step."""
        self.turn.done(self.trainer.loss)
        self.turn.next()


def run(spec: dict[str, Any], turn: Turn) -> None:
    """Run the trainer's loop."""
    base = load(spec)
    turn.loaded(base)
    shipped = spec["form"] == "shipped"
    batch = len(spec["steps"][0])
    flat = [row for step in spec["steps"] for row in step]
    rows = Dataset.from_list(
        [
            {
                "input_ids": row["ids"],
                "labels": [t if w else -100 for t, w in zip(row["ids"], row["weights"], strict=True)],
            }
            for row in flat
        ]
    )
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "max_steps": 100_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,  # otherwise bf16, the default, is refused without a GPU
        "learning_rate": LEARNING_RATE,
    }
    if not shipped:
        options |= {
            "gradient_checkpointing": False,
            "bf16": False,
            "lr_scheduler_type": "constant",
            "max_length": None,
            "logging_strategy": "no",
        }
    stops = _Stops(turn)
    start: dict[str, Any] = {"model": base, "peft_config": _config(spec)}
    if not shipped:
        start = {"model": PeftModel.from_pretrained(base, spec["adapter"], is_trainable=True)}
    trainer = _InOrder(args=SFTConfig(**options), train_dataset=rows, callbacks=[stops], **start)
    stops.trainer = trainer
    turn.next()
    trainer.train()


def _config(spec: dict[str, Any]) -> LoraConfig:
    """A new copy of the adapter's configuration."""
    stored = PeftConfig.from_pretrained(spec["adapter"])
    return LoraConfig(
        r=stored.r,
        lora_alpha=stored.lora_alpha,
        lora_dropout=stored.lora_dropout,
        target_modules=stored.target_modules,
        use_dora=stored.use_dora,
        task_type="CAUSAL_LM",
    )
