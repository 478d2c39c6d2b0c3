"""Mixed batches over stacked experts: the time of a training pass with several adapters over that with one, on one mixture block.

    python -m bench.experts                 # Qwen3-30B-A3B's sizes with 32 experts; a ratio per method with its spread

Contestants take one pass in turn, so that a busy machine slows all of them alike. Time is the process's CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from veneer.adapters import DoRA, LoRA, attach


def block(hidden: int, intermediate: int, experts: int, active: int) -> Any:
    """A mixture block of Qwen3-MoE with random weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts, num_experts_per_tok=active
    )
    config._experts_implementation = "grouped_mm"
    made = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.02)
    return made


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model = block(2048, 768, args.experts, 8)
    x = torch.randn(args.adapters, args.tokens // args.adapters, 2048)
    bank = attach(model, example={"hidden_states": x[:2]})
    for name, method in (("lora", LoRA(r=16)), ("dora", DoRA(r=16))):
        for number in range(args.adapters):
            bank.add(f"{name}{number}", method)
    routes: dict[str, Any] = {"base": None}
    for name in ("lora", "dora"):
        routes[f"{name}, one adapter"] = f"{name}0"
        routes[f"{name}, {args.adapters} adapters"] = [f"{name}{number}" for number in range(args.adapters)]
    times: dict[str, list[float]] = {key: [] for key in routes}
    for _ in range(args.rounds + 1):
        for key, route in routes.items():
            start = time.process_time()
            sample = x.clone().requires_grad_()
            with bank.use(route):
                model(sample).square().sum().backward()
            times[key].append(time.process_time() - start)
    for key, values in times.items():
        found = values[1:]
        print(f"{key:>20}: {statistics.median(found) * 1e3:8.1f} ms ({min(found) * 1e3:.1f} to {max(found) * 1e3:.1f})")
    for name in ("lora", "dora"):
        one, several = times[f"{name}, one adapter"][1:], times[f"{name}, {args.adapters} adapters"][1:]
        ratios = sorted(b / a for a, b in zip(one, several, strict=True))
        print(f"{name}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times one adapter's")


if __name__ == "__main__":
    main()
