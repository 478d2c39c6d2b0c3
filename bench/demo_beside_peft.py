"""Train like the demo with PEFT: same base, rows, order, steps and learning rate, in an ordinary padded loop.

    python -m bench.demo_beside_peft runs/demo        after `veneer demo --out runs/demo`

Prints PEFT's seconds per step, held-out loss and peak memory; the demo prints its own. PEFT is a test dependency.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from veneer.data.chat.render import Renderer
from veneer.data.dataset import load_examples
from veneer.data.example import Example
from veneer.data.order import Order
from veneer.models.load import load_base
from veneer.training.process_memory import highest


def main() -> None:
    """Train with PEFT on the demo's rows and evaluate on its held-out rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run folder of veneer demo")
    parser.add_argument("--steps", type=int, default=70)
    args = parser.parse_args()
    base = load_base("smollm2-135m")
    renderer = Renderer(base.tokenizer)
    train, _ = load_examples([args.run / "data" / "train.jsonl"], renderer)
    valid, _ = load_examples([args.run / "data" / "valid.jsonl"], renderer)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base.model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0)
    print(f"held-out loss before {evaluate(model, valid[:]):.4f}")
    order, began = Order(len(train), 0), time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1.0, (step + 1) / 5)
        rows = [train[order.at(step * 7 + i)] for i in range(7)]
        loss, weight = losses(model, rows)
        (loss / weight).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    print(f"PEFT: {args.steps} steps in {seconds / 60:.2f} minutes, {seconds / args.steps:.2f} s per step")
    print(f"held-out loss after {evaluate(model, valid[:]):.4f}")
    print(f"{highest() / 1e9:.2f} GB peak memory")


def losses(model: torch.nn.Module, rows: list[Example]) -> tuple[torch.Tensor, float]:
    """Summed loss over the trained tokens of padded rows, and their number."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, weights = torch.zeros_like(ids), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row.ids), 1
        weights[i, : len(row)] = torch.tensor(row.weights)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (ce * weights[:, 1:].flatten()).sum(), float(weights.sum())


@torch.no_grad()
def evaluate(model: torch.nn.Module, rows: list[Example]) -> float:
    """Mean loss over the trained tokens."""
    parts = [losses(model, rows[i : i + 7]) for i in range(0, len(rows), 7)]
    return sum(float(loss) for loss, _ in parts) / sum(weight for _, weight in parts)


if __name__ == "__main__":
    main()
