"""The lower bound: only the matrix products of a step.

    every linear layer    Y = X W^T  and  dX = dY W         2 products of [T, d] with [d, k]
    the head              the same, for the K supervised tokens only
    adapters              6 P FLOPs per token, at the rate of the layers' products in the same step

with the T and K of the step, the shapes of the model, and separate weights per layer, so caches are as cold as in a model. Outputs are
preallocated. In total 4 N + 6 P FLOPs per token, at the current rate of the machine.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.workers.turn import Turn


class Shapes:
    """Products of a model: (outputs, inputs) of each layer and of the head, without allocating weights."""

    def __init__(self, folder: str) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
        head = model.get_output_embeddings()
        self.layers: list[tuple[int, int]] = []
        for module in model.modules():
            if module is head:
                continue
            if isinstance(module, nn.Linear):
                self.layers.append((module.out_features, module.in_features))
            elif isinstance(module, transformers.pytorch_utils.Conv1D):
                self.layers.append((module.nf, module.nx))
        self.head = (int(head.weight.shape[0]), int(head.weight.shape[1]))
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention = 2 * config.num_hidden_layers * config.num_attention_heads * width
        """FLOPs of causal attention, forward, per pair of tokens in a segment."""

    def flops(self, lengths: list[int], supervised: int, r: int) -> float:
        """4 N + 6 P + 3 A of a step; with r = 0, 6 N + 3 A of full fine-tuning."""
        n = sum(out * inner for out, inner in self.layers)
        p = r * sum(out + inner for out, inner in self.layers)
        head = self.head[0] * self.head[1]
        scores = 3.0 * self.attention * sum(length**2 for length in lengths)
        return (4 if r else 6) * (n * sum(lengths) + head * supervised) + 6.0 * p * sum(lengths) + scores


def run(spec: dict[str, Any], turn: Turn) -> None:
    """Run the products of each step."""
    dtype = getattr(torch, spec["dtype"])
    shapes = Shapes(spec["base"])
    weights = [torch.randn(out, inner).to(dtype) for out, inner in shapes.layers]
    head = torch.randn(*shapes.head).to(dtype)
    turn.loaded(nn.Module())
    for rows in turn:
        lengths = [len(row["ids"]) for row in rows]
        tokens = sum(lengths)
        supervised = sum(sum(1 for w in row["weights"] if w) for row in rows)
        spent: dict[str, list[float]] = {}
        xs = {size: torch.randn(tokens, size).to(dtype) for pair in shapes.layers for size in pair}
        outs = {size: torch.empty_like(x) for size, x in xs.items()}
        for weight in weights:
            _both(weight, xs, outs, spent)
        layers = sum(seconds for seconds, _ in spent.values())
        rate = sum(flops for _, flops in spent.values()) / layers
        small = {size: torch.randn(supervised, size).to(dtype) for size in shapes.head}
        outs = {size: torch.empty_like(x) for size, x in small.items()}
        _both(head, small, outs, spent)
        adapters = 6 * spec["r"] * sum(map(sum, shapes.layers)) * tokens / rate
        floor = sum(seconds for seconds, _ in spent.values()) + adapters
        turn.figures = {
            "floor": floor,
            "rates": {name: flops / seconds for name, (seconds, flops) in spent.items()},
            "flops": shapes.flops(lengths, supervised, spec["r"]),
            "flops_full": shapes.flops(lengths, supervised, 0),
            "products": sum(flops for _, flops in spent.values())
            + 6 * spec["r"] * sum(map(sum, shapes.layers)) * tokens,
        }
        turn.done(0.0)


def _both(weight: Tensor, xs: dict[int, Tensor], outs: dict[int, Tensor], spent: dict[str, list[float]]) -> None:
    """Forward and backward product of one layer, timed."""
    out, inner = weight.shape
    tokens = len(xs[inner])
    for name, one, other, into in (
        ("forward", xs[inner], weight.t(), outs[out]),
        ("backward", xs[out], weight, outs[inner]),
    ):
        began = time.perf_counter()
        torch.mm(one, other, out=into)
        entry = spent.setdefault(f"{name} [{tokens}, {one.shape[1]}] x [{one.shape[1]}, {other.shape[1]}]", [0.0, 0.0])
        entry[0] += time.perf_counter() - began
        entry[1] += 2.0 * tokens * out * inner
