"""Other programs on the same model in memory: PEFT on padded rows, PEFT on a flat batch, and TRL's trainer with Liger's kernels."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.workers.plain import batch as padded
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.kernels.cross_entropy import linear_cross_entropy
from veneer.models.flat import FlatRunner

Step = Callable[[], Tensor]


@contextmanager
def adapted_by_peft(model: Any, first: Mapping[str, Tensor], rank: int) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """PEFT's LoRA on the model inside this context, with the given A; yields the model, and B of each site."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    factors = {}
    for site, a in first.items():
        layer = theirs.base_model.model.get_submodule(site)
        layer.lora_A["default"].weight.data.copy_(a)
        factors[site] = layer.lora_B["default"].weight
    try:
        yield theirs.train(), factors
    finally:
        theirs.unload()
        model.requires_grad_(False).eval()


def peft_padded(model: Any, rows: list[Example], device: torch.device) -> Step:
    """The ordinary loop: padded rows, the model's own loss, autocast in bf16."""
    given = {
        k: v.to(device) for k, v in padded([{"ids": r.ids, "weights": r.weights} for r in rows], causal=True).items()
    }
    return lambda: _loss(model, given, device)


def _loss(model: Any, given: Mapping[str, Tensor], device: torch.device) -> Tensor:
    with _autocast(model, device):
        loss: Tensor = model(**given).loss
    return loss


def peft_flat(model: Any, rows: list[Example], device: torch.device) -> Step:
    """PEFT's layers in our flat runner, with our loss: what the low-rank layers alone cost."""
    inner = model.base_model.model
    runner = FlatRunner(inner.eval())
    inner.train()
    batch = make_batch(rows, "job")
    keep = batch.weights.nonzero().squeeze(1)
    flat, (index, targets, weights) = runner.send(batch, keep, batch.targets[keep], batch.weights[keep])
    head = runner.head()
    assert head is not None

    def step() -> Tensor:
        with _autocast(inner, device):
            hidden = runner.hidden(flat)[index]
        total, _ = linear_cross_entropy(hidden.to(head[0].dtype), head[0], head[1], targets, weights, all_count=True)
        return total / weights.sum()

    return step


def _autocast(model: Any, device: torch.device) -> torch.autocast:
    dtype = next(model.parameters()).dtype
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def trl_seconds(model: Any, rows: list[Example], rank: int, *, steps: int) -> float:
    """The median time of a step of TRL's SFTTrainer with Liger's kernels."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class _Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    flat = [
        {"input_ids": r.ids, "labels": [t if w else -100 for t, w in zip(r.ids, r.weights, strict=True)]} for r in rows
    ]
    options = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(rows),
        max_steps=steps + 2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        gradient_checkpointing=False,
        bf16=True,
        max_length=None,
        use_liger_kernel=True,
    )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    SFTTrainer(
        model=model,
        args=options,
        train_dataset=Dataset.from_list(flat * (steps + 2)),
        callbacks=[_Clock()],
        peft_config=config,
    ).train()
    return statistics.median(b - a for a, b in itertools.pairwise(times[1:]))
