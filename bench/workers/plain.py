"""PEFT, or full fine-tuning, in an ordinary loop: padded rows, the model's own loss, AdamW.

In bf16, PEFT keeps its adapters in fp32 by default; the form "low" keeps them in bf16.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.workers.turn import Rows, Turn

LEARNING_RATE = 2e-5


def load(spec: dict[str, Any]) -> Any:
    """The base as transformers loads it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(spec["base"])
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(spec["base"], dtype=getattr(torch, spec["dtype"]))


def adapted(spec: dict[str, Any], model: Any) -> Any:
    """The model, with gradients only for the trained parameters."""
    if spec["method"] != "full":
        from peft import PeftModel

        low = spec["form"] == "low"
        model = PeftModel.from_pretrained(model, spec["adapter"], is_trainable=True, autocast_adapter_dtype=not low)
        if low:
            model = model.to(getattr(torch, spec["dtype"]))
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if spec["method"] != "full":
            model.enable_input_require_grads()
    return model.train()


def batch(rows: Rows, *, causal: bool) -> dict[str, torch.Tensor]:
    """Rows as padded tensors, with labels as the model's loss expects them."""
    width = max(len(row["ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        size = len(row["ids"])
        ids[i, :size], mask[i, :size] = torch.tensor(row["ids"]), 1
        labels[i, :size] = torch.tensor([t if w else -100 for t, w in zip(row["ids"], row["weights"], strict=True)])
    if not causal:  # a masked model does not shift its labels
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(spec: dict[str, Any], turn: Turn) -> None:
    """Take steps until the pipe is closed."""
    base = load(spec)
    causal = "CausalLM" in type(base).__name__ or "LMHead" in type(base).__name__
    if spec["method"] != "full":
        import peft  # noqa: F401  (keep the import out of the step)
    turn.loaded(base)
    model = adapted(spec, base)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = LEARNING_RATE if spec["method"] != "full" else LEARNING_RATE / 10
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    for rows in turn:
        loss = model(**batch(rows, causal=causal)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turn.done(float(loss.detach()))
