"""The head of a classifier on a flat batch: the state of one token of each segment goes through it.

A transformers classifier runs its body on padded rows, takes the state of the first token ([CLS]) or of the last one, and computes logits
from it. Here the model's own forward runs on rows of one token, and for the length of the call its body computes the flat batch and gives
the chosen states back: [S, 1, D] in place of [S, Tmax, D]. All that the model does with them stays its own. Models that read their texts in
another way (mean pooling) are found when a runner is made, and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Place = Literal["first", "last"]
PLACES: tuple[Place, ...] = ("first", "last")


def reads_segments(model: nn.Module) -> bool:
    """True if the model's head reads one state of each text."""
    return type(model).__name__.endswith("ForSequenceClassification")


def tokens_read(offsets: Tensor, place: Place) -> Tensor:
    """The token of each segment whose state the head reads, [S]."""
    return offsets[:-1] if place == "first" else offsets[1:] - 1


@contextmanager
def pooled_body(body: nn.Module, inputs: dict[str, Any], cells: Tensor) -> Iterator[None]:
    """Inside this context, the body computes ``inputs`` whatever it is given, and returns the states of ``cells`` [S], as [S, 1, D]."""
    original: Callable[..., Any] = body.forward
    own = body.__dict__.get("forward")

    def take(states: Tensor) -> Tensor:
        return states.flatten(0, 1)[cells.to(states.device)].unsqueeze(1)

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(**inputs)
        pooled = getattr(out, "pooler_output", None)
        more = {} if pooled is None else {"pooler_output": pooled}
        return type(out)(last_hidden_state=take(out.last_hidden_state), **more)

    def before_pooler(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (take(args[0]), *args[1:])

    pooler = getattr(body, "pooler", None)
    handle = pooler.register_forward_pre_hook(before_pooler) if isinstance(pooler, nn.Module) else None
    body.forward = forward
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
        if handle is not None:
            handle.remove()


def one_token_rows(ids: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The input of a model whose body is replaced: rows of one token each, [S, 1]."""
    rows = ids[tokens.to(ids.device)].unsqueeze(1)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
