"""Full fine-tuning with Veneer's own kernels: flat rows, its attention, its loss over supervised tokens, its elementwise chains.

It differs from an adapter's step only by the gradients and the update of every base weight.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.workers.turn import Turn
from veneer.data.batch import make_batch, packed
from veneer.data.example import Example
from veneer.kernels.cross_entropy import linear_cross_entropy
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base
from veneer.training.cpp_kernels import use_cpp_kernels

LEARNING_RATE = 2e-6
_TOKENS_PER_PASS = 1024


def run(spec: dict[str, Any], turn: Turn) -> None:
    """Take steps until the pipe is closed."""
    base = load_base(spec["base"], dtype=spec["dtype"])
    use_cpp_kernels()
    use_fast_forwards(base.model)  # norms are trained here and keep their own forward
    turn.loaded(base.model)
    runner = FlatRunner(base.model)
    parameters = [p.requires_grad_() for p in base.model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for rows in turn:
        examples = [Example(tuple(row["ids"]), tuple(row["weights"])) for row in rows]
        weight = sum(sum(example.weights) for example in examples)
        loss = 0.0
        for piece in packed(examples, _TOKENS_PER_PASS):
            batch = make_batch(piece, "full")
            keep = (batch.weights != 0).nonzero().squeeze(1)
            head = runner.head()
            assert head is not None
            hidden = runner.hidden(batch)[keep]
            total, _ = linear_cross_entropy(hidden, head[0], head[1], batch.targets[keep], batch.weights[keep])
            (total / weight).backward()
            loss += float(total.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turn.done(loss / weight)
