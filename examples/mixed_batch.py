"""Run one batch whose rows use different adapters, a weighted mix, or the base alone.

python examples/mixed_batch.py
"""

from __future__ import annotations

import sys

import torch

import veneer
from veneer import DoRA, LoRA


def main(model: str = "smollm2-135m") -> float:
    """Compare each row of a mixed batch with the same row alone; returns the largest difference of the logits."""
    base = veneer.load_base(model, dtype="float32")
    bank = veneer.attach(base.model)
    bank.add("one", LoRA(r=8))
    bank.add("two", DoRA(r=4))
    with torch.no_grad():  # stands in for training: B starts at zero, so a new adapter changes nothing
        for name in ("one", "two"):
            for parameter in bank.parameters(name):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    routes = ["one", None, {"one": 0.7, "two": 0.3}]
    ids = base.tokenizer("the quick brown fox", return_tensors="pt").input_ids.repeat(3, 1)
    with torch.no_grad():
        with bank.use(routes):
            together = base.model(input_ids=ids).logits
        worst = 0.0
        for row, route in enumerate(routes):
            with bank.use(route):
                alone = base.model(input_ids=ids[row : row + 1]).logits[0]
            worst = max(worst, float((together[row] - alone).abs().max()))
    print(f"largest difference between a row in company and alone: {worst:.1e}")
    return worst


if __name__ == "__main__":
    main(*sys.argv[1:2])
