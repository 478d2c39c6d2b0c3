"""Check if a model computes flat batches exactly, with two short segments, when a runner is made.

    each segment alone, by the ordinary call      ==      both in one batch         (values)
    the second segment, first segment unchanged   ==      first segment's tokens replaced    (isolation)

A model that fails flat (its own attention, position biases, state along the tokens) is tried on padded rows; one that fails both is
refused. In bf16 a wrong segment boundary is an error of order one, and rounding one to three hundredths; the bound lies between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from veneer.errors import BaseModelError
from veneer.models.classifiers.pooling import PLACES, Place
from veneer.models.devices import device_of
from veneer.models.flat_attention import NotFlat, SegmentMask, Switch
from veneer.models.layout import Flat, FlatLike

_BOUND = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
_FAILS = "call fails with"


class CheckedRunner(Protocol):
    """The part of a `FlatRunner` that the check uses and sets."""

    model: torch.nn.Module
    kind: str
    reason: str
    first_position: int
    _takes: frozenset[str]
    _body: Any
    _switch: Switch
    _head: torch.nn.Module | None
    _last: torch.nn.Module | None
    place: Place | None

    def logits(self, flat: FlatLike, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the model's own head."""

    def hidden(self, flat: FlatLike) -> torch.Tensor:
        """Final states."""


@torch.no_grad()
def probe(runner: CheckedRunner) -> None:
    """Decide ``runner.kind``, ``reason`` and ``first_position``, and find the head.

    Raises:
        BaseModelError: neither flat nor padded gives what each segment gives alone.
    """
    with eval_mode(runner.model):
        first, second, other = _samples(runner.model)
        alone = [_alone(runner, first), _alone(runner, second)]
        reasons: list[str] = []
        for kind in ("flat", "padded"):
            reason = _try(runner, kind, first, second, other, alone)
            if reason is None:
                runner.kind, runner.reason = kind, "; ".join(reasons)
                runner._head = _find_head(runner, first, second)
                if runner.place is not None:
                    runner.place = _find_place(runner, first, second)
                return
            reasons.append(reason)
    if all(_FAILS in reason for reason in reasons):
        raise BaseModelError(
            f"{type(runner.model).__name__} cannot be run on batches of text: {reasons[-1]}; use a language model that takes token "
            "ids alone"
        )
    raise BaseModelError(
        f"{type(runner.model).__name__} gives other results in a batch than for each text alone ({'; '.join(reasons)}), so "
        f"it can be neither trained nor measured in batches; use another base"
    )


def _try(
    runner: CheckedRunner, kind: str, first: list[int], second: list[int], other: list[int], alone: list[torch.Tensor]
) -> str | None:
    """None if this way is exact, with the position numbering that made it so; else the reason."""
    runner.kind = kind
    flat, changed = Flat.of([first, second]), Flat.of([other, second])
    reason = None
    for start in _position_starts(runner):
        runner.first_position = start
        try:
            together = runner.hidden(flat)
            if kind == "flat" and runner._switch.attention_calls == 0:
                return "its attention does not go through transformers' attention interface"
            worst = max(
                relative_error(together[: len(first)], alone[0]),
                relative_error(together[len(first) :], alone[1]),
            )
            moved = relative_error(runner.hidden(changed)[len(other) :], together[len(first) :])
        except BaseModelError as error:
            return str(error.__cause__ if isinstance(error.__cause__, NotFlat) else error)
        except Exception as error:  # as above
            if isinstance(getattr(error, "obj", None), SegmentMask):
                return "its attention computes with the mask itself"
            return f"the {kind} {_FAILS} {type(error).__name__}: {error}"
        bound = _bound(runner.model)
        if worst <= bound and moved <= bound:
            return None
        if reason is None:
            reason = f"{kind}, one of two texts differs from its own call by {worst:.1e}, and moves by {moved:.1e} with the other text"
    return reason


def _position_starts(runner: CheckedRunner) -> tuple[int, ...]:
    """Numbers that a model's first position may have: 0, or one past its padding token, as RoBERTa's family counts."""
    pad = getattr(runner.model.config, "pad_token_id", None)
    return (0, pad + 1) if isinstance(pad, int) and pad >= 0 and "position_ids" in runner._takes else (0,)


def _samples(model: torch.nn.Module) -> tuple[list[int], list[int], list[int]]:
    """Three lists of token ids, none special: two segments, and one to stand in the first's place (all of other tokens)."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = {
        getattr(text, name, None)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    }
    size = int(text.vocab_size)
    usable = [token for token in range(size // 8, size) if token not in special] or list(range(size))
    window = getattr(text, "sliding_window", None) or getattr(text, "local_attention", None)
    longest = min(int(window), 64) + 5 if isinstance(window, int) else 12

    def draw(count: int, step: int) -> list[int]:
        return [usable[(17 + step * (i + 1) * (i + 3)) % len(usable)] for i in range(count)]

    return draw(9, 7), draw(longest, 11), draw(9, 13)


def _alone(runner: CheckedRunner, tokens: list[int]) -> torch.Tensor:
    """Final states [L, D] of one segment by the model's ordinary call, with the positions of its own choice."""
    ids = torch.tensor([tokens], device=device_of(runner.model))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "use_cache" in runner._takes:
        inputs["use_cache"] = False
    caught: list[torch.Tensor] = []
    # Of the whole model, since a part of a divided one cannot be called alone.
    handle = runner._body.register_forward_hook(lambda _module, _args, output: caught.append(output.last_hidden_state))
    try:
        runner.model(**inputs)
        states = caught[-1][0]
    except Exception as error:  # a model that was never meant for this call can fail anywhere inside it
        name = type(runner.model).__name__
        raise BaseModelError(
            f"{name} cannot be run on one text by its token ids alone ({type(error).__name__}: {error}); use another base"
        ) from error
    finally:
        handle.remove()
    return states


def _find_head(runner: CheckedRunner, first: list[int], second: list[int]) -> torch.nn.Module | None:
    """The output layer, if the model's logits are exactly that layer applied to the final states."""
    model: Any = runner.model
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(layer, "weight", None)
    if runner._body is runner.model or not isinstance(layer, torch.nn.Module) or weight is None or weight.dim() != 2:
        return None
    flat = Flat.of([first, second])
    try:
        logits = runner.logits(flat)
    except BaseModelError:
        return None
    for last in (None, layer):
        runner._last = last
        with contextlib.suppress(Exception):  # a model may do anything with an output layer that gives nothing
            states = runner.hidden(flat)
            # Read now: of a divided base it is whole from the forward on.
            found = torch.nn.functional.linear(states, getattr(layer, "weight"), getattr(layer, "bias", None))  # noqa: B009
            if logits.shape == found.shape and relative_error(found, logits) <= _bound(runner.model) / 10:
                return layer
    runner._last = None
    return None


def _find_place(runner: CheckedRunner, first: list[int], second: list[int]) -> Place:
    """The token that a classifier's head reads.

    Raises BaseModelError if it reads a text in another way.
    """
    device = device_of(runner.model)
    alone = []
    for tokens in (first, second):
        ids = torch.tensor([tokens], device=device)
        alone.append(runner.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0])
    expected = torch.stack(alone)
    for place in PLACES:
        runner.place = place
        if relative_error(runner.logits(Flat.of([first, second])), expected) <= _bound(runner.model):
            return place
    raise BaseModelError(
        f"the head of {type(runner.model).__name__} reads neither the first nor the last token of a text (such as the mean of all), so it "
        "cannot be trained in batches without padding; use another base"
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; infinite where anything is not finite."""
    distance = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float(distance) if torch.isfinite(distance) else float("inf")


def _bound(model: torch.nn.Module) -> float:
    return _BOUND.get(next(model.parameters()).dtype, _BOUND[torch.bfloat16])


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode after: dropout would make any two calls differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
