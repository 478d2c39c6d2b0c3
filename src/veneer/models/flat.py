"""Run a model on a flat batch: concatenated segments without padding that never see each other.

    runner = FlatRunner(base.model)
    runner.kind                          "flat", or "padded" with the cause in runner.reason
    runner.logits(flat, keep)            [K, V]: the model's own head at the kept tokens; of a classifier, at the segments that they are in
    runner.hidden(flat)                  [T, D]: the input of the head, for a fused loss

Every linear layer sees [1, T, d], so that no work is done for padding; attention alone knows the segments (see
``flat_attention.py``). Some models do not follow the extension point that this needs and compute something else. A runner is therefore
checked when it is made (``flat_check.py``), and a model that fails runs on padded rows behind the same interface: the layout maps each
token of the flat batch to a position in [S, Tmax].

Boundary: a runner holds no route and no adapter; callers that route tokens read the layout of `prepare`. Gradients flow if the
caller lets them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from veneer.errors import BaseModelError
from veneer.kernels.attention.prepended import Prepended
from veneer.kernels.attention.segments import Segments
from veneer.models.classifiers.pooling import PLACES, Place, one_token_rows, pooled_body, reads_segments, tokens_read
from veneer.models.devices import device_of, together
from veneer.models.divided.sequence_split import SequenceSplit
from veneer.models.flat_attention import Attend, NotFlat, Switch
from veneer.models.flat_check import probe as run_probe
from veneer.models.layout import Flat, FlatLike, Layout, PreparedBatch

__all__ = ["Flat", "FlatLike", "FlatRunner", "Layout", "PreparedBatch"]


class FlatRunner:
    """Runs one model on flat batches.

    Args:
        model: a transformers model that takes ``input_ids``.
        probe: check now that flat batches are exact for this model; otherwise this is assumed.

    Raises:
        BaseModelError: the model takes no token ids, or neither way gives what each segment alone gives.

    Attributes:
        kind: "flat" or "padded".
        reason: why the flat way is not taken; empty if it is.
        place: the token of a segment whose state the head of a classifier reads, "first" or "last"; None for heads that read every token.
    """

    def __init__(self, model: torch.nn.Module, *, probe: bool = True) -> None:
        self.model = model
        self.kind = "flat"
        self.reason = ""
        self.first_position = 0
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._body = _body(model)
        self._config: Any = getattr(model, "config", None)
        self._switch = Switch(model)
        self._prepended: Prepended | None = None
        self.split: SequenceSplit | None = None
        """The share of each batch's tokens that this process computes, where several compute a batch together."""
        self._head: torch.nn.Module | None = None
        self._last: torch.nn.Module | None = None
        """The output layer, where the model has more than it behind its final states."""
        self.place: Place | None = PLACES[0] if reads_segments(model) else None
        self._check_model()
        if probe:
            run_probe(self)

    def _check_model(self) -> None:
        config = self._config
        name = type(self.model).__name__
        if "input_ids" not in self._takes or config is None:
            raise BaseModelError(
                f"{name} takes no token ids, so it cannot be run on batches of text; use a language model"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise BaseModelError(
                f"{name} is an encoder-decoder model, whose two inputs have no flat form; call it directly on padded rows"
            )

    def prepare(self, flat: FlatLike) -> PreparedBatch:
        """The batch on the model's device, with its layout. A prepared batch is returned as it is, so a caller that prepares one moves
        it once."""
        return flat if isinstance(flat, PreparedBatch) else self.send(flat)[0]

    def send(self, flat: FlatLike, *more: torch.Tensor) -> tuple[PreparedBatch, list[torch.Tensor]]:
        """`prepare` a batch and move other tensors of it to the model's device, all in one copy."""
        types: torch.Tensor | None = getattr(flat, "types", None)
        if self.split is not None:
            layout = self.split.layout(flat)
            shared = self.split.take(flat, layout)
            types = None if types is None else types[layout.index.clamp_min(0)]
        else:
            layout = Layout.flat(flat) if self.kind == "flat" else Layout.padded(flat)
            shared = flat.ids, flat.positions
        ids, positions, *others = together(device_of(self.model), *shared, *more)
        return PreparedBatch(ids, positions, flat.offsets, layout, types), others

    def here(self, flat: FlatLike, tokens: torch.Tensor) -> torch.Tensor:
        """Those of a batch's tokens (ascending flat indices) that this process computes: all, unless the batch is split."""
        return tokens if self.split is None else self.split.here(flat, tokens)

    def rows(self, flat: FlatLike, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of `hidden` with these tokens of this process."""
        return tokens if self.split is None else tokens - self.split.window(flat.ids.numel())[0]

    def logits(self, flat: FlatLike, keep: torch.Tensor | None = None, *, attend: Attend | None = None) -> torch.Tensor:
        """Logits [K, V] at the tokens ``keep`` (flat indices, [K]; None means all), from the model's own head.

        Only the kept positions go through the head where the model can be told so; soft caps and scales are the
        model's. ``attend`` replaces attention inside segments, for keys and values that come from a cache; it takes a runner of the kind
        "flat".
        """
        batch = self.prepare(flat)
        if self.place is not None:
            return self._segment_logits(batch, keep)
        columns, row, at = self._head_columns(batch, keep)
        options: dict[str, Any] = {} if columns is None else {"logits_to_keep": columns.to(batch.ids.device)}
        out = self._run(batch, attend, **options)
        logits = getattr(out, "logits", None)
        if logits is None or logits.dim() != 3:
            raise BaseModelError(
                f"{type(self.model).__name__} has no logits per token; load the base as a language model for this use"
            )
        if columns is at:  # spares a copy
            return logits[0]  # type: ignore[no-any-return]
        row, at = together(logits.device, row, at)
        return logits[row, at]  # type: ignore[no-any-return]

    def head_cells(self, flat: FlatLike, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The cells of ``layout`` that the head is given when ``logits(flat, keep)`` is called, in its order; on the CPU."""
        batch = self.prepare(flat)
        if self.place is not None:
            return batch.layout.cell[self._tokens_read(batch, keep)]
        columns, _, _ = self._head_columns(batch, keep)
        rows, width = batch.layout.shape
        every = torch.arange(width) if columns is None else columns
        return (torch.arange(rows)[:, None] * width + every).flatten()

    def _segment_logits(self, batch: PreparedBatch, keep: torch.Tensor | None) -> torch.Tensor:
        """Outputs [S, L] of a classifier's head for the segments that have tokens in ``keep``, in their order."""
        tokens = self._tokens_read(batch, keep)
        rows = one_token_rows(batch.ids, tokens)

        def call(**inputs: Any) -> Any:
            with pooled_body(self._body, inputs, batch.layout.cell[tokens]):
                return self.model(**rows)

        logits: torch.Tensor = self._run(batch, call=call).logits
        return logits

    def _tokens_read(self, batch: PreparedBatch, keep: torch.Tensor | None) -> torch.Tensor:
        """The tokens whose states the head reads, for the segments that have tokens in ``keep`` (None: for all), on the CPU."""
        assert self.place is not None
        tokens = tokens_read(batch.offsets, self.place)
        if keep is None:
            return tokens
        return tokens[torch.unique_consecutive(torch.searchsorted(batch.offsets, keep.cpu(), right=True) - 1)]

    def _head_columns(
        self, batch: PreparedBatch, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(columns that go through the head, None for all; row of each kept token; its place among the columns), on the CPU."""
        layout = batch.layout
        width = max(1, layout.shape[1])
        cells = layout.cell if keep is None else layout.cell[keep.cpu()]
        row, column = cells // width, cells % width
        if "logits_to_keep" not in self._takes:
            return None, row, column
        if layout.shape[0] == 1 and bool((column[1:] > column[:-1]).all()):
            return column, row, column
        columns, at = torch.unique(column, return_inverse=True)
        return columns, row, at

    def hidden(self, flat: FlatLike) -> torch.Tensor:
        """Final hidden states [T, D] in flat order: what the model's head would see.

        The call goes through the whole model, so that whatever is attached to it takes part; the head gets no
        tokens where the model can be told so, and the output layer behind a head's other layers gets none either.
        """
        batch = self.prepare(flat)
        states = self._run(batch).last_hidden_state if self._body is self.model else self._caught(batch)
        rows: torch.Tensor = states.flatten(0, 1)
        return rows if self.kind == "flat" else rows[batch.layout.cell.to(rows.device)]

    def _caught(self, batch: PreparedBatch) -> torch.Tensor:
        """The output of the body, or the input of the output layer if other layers precede it."""
        caught: list[torch.Tensor] = []
        thread = threading.get_ident()

        def given(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if threading.get_ident() != thread:
                return None
            caught.append(args[0])
            return (args[0][:, :0], *args[1:])

        def made(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                caught.append(output.last_hidden_state)

        options: dict[str, Any] = {}
        if self._last is not None:
            handle = self._last.register_forward_pre_hook(given)
        else:
            handle = self._body.register_forward_hook(made)
            if "logits_to_keep" in self._takes:
                options["logits_to_keep"] = torch.zeros(0, dtype=torch.long, device=batch.ids.device)
        try:
            self._run(batch, **options)
        finally:
            handle.remove()
        return caught[-1]

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """(weight [V, D], bias [V] or None) if logits = hidden @ weight.T + bias, as the probe has verified.

        None for models that cap or scale their logits. Where other layers stand between the body and the output layer
        (BERT's), `hidden` gives what they make of the body's states. The weights of a sharded base are whole between its forward and the
        end of its backward.
        """
        layer: Any = self._head
        return None if layer is None else (layer.weight, getattr(layer, "bias", None))

    @property
    def longest_position(self) -> int | None:
        """The number of tokens from which on positions of a batch would depend on each other; None if they never do."""
        return _rope_limit(self._config)

    def _run(
        self, batch: PreparedBatch, attend: Attend | None = None, call: Callable[..., Any] | None = None, **options: Any
    ) -> Any:
        call, inputs = call or self.model, self._inputs(batch)
        self._check_rope(batch.offsets)
        if self.kind == "padded":
            return call(**inputs, **options)
        segments = Segments.of(batch.offsets) if self.split is None else self.split.segments(batch.offsets)
        if self.split is not None:
            attend = self.split.attention(segments)
        if segments.tokens != batch.ids.numel() * (1 if self.split is None else self.split.seats):
            raise BaseModelError(
                f"the offsets of a flat batch end at {segments.tokens}, and it has {batch.ids.numel()} tokens"
            )
        try:
            with self._switch.flat(segments, attend, self._prepended):
                return call(**inputs, **options)
        except NotFlat as error:
            raise BaseModelError(
                f"{type(self.model).__name__} cannot be run on a flat batch: {error}; make a new FlatRunner for it, which "
                f"finds the way that it can"
            ) from error

    @contextmanager
    def inside(self, batch: PreparedBatch) -> Iterator[None]:
        """A context in which blocks of the model may be called alone, with what the model gave them for this batch."""
        if self.kind == "padded":
            yield
            return
        with self._switch.flat(Segments.of(batch.offsets)):
            yield

    @contextmanager
    def prepending(self, prepended: Prepended | None) -> Iterator[None]:
        """In this context, batches begin their segments with virtual tokens, and with keys and values of their own.

        The rows of the batch's virtual tokens replace the input embeddings, whatever ids stand there; positions are the caller's.

        Raises:
            BaseModelError: the model runs on padded rows, or has no input embedding.
        """
        if prepended is None:
            yield
            return
        model: Any = self.model
        embedding: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if self.kind != "flat" or embedding is None:
            raise BaseModelError(
                f"{type(model).__name__} cannot take virtual tokens: {self.reason or 'it has no input embedding'}; use a method that "
                "changes layers, such as lora"
            )
        if self.split is not None:
            raise BaseModelError(
                "virtual tokens cannot stand in batches whose tokens are divided among processes; leave that option out, or use a method "
                "that changes layers, such as lora"
            )
        thread = threading.get_ident()

        def replace(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
            return prepended.embedded(output) if threading.get_ident() == thread else None

        handle, self._prepended = embedding.register_forward_hook(replace), prepended
        try:
            yield
        finally:
            self._prepended = None
            handle.remove()

    def _inputs(self, batch: PreparedBatch) -> dict[str, Any]:
        layout, ids, positions = batch.layout, batch.ids, batch.positions + self.first_position
        if self.kind == "padded":
            index = layout.index.to(ids.device)
            real = index >= 0
            token = index.clamp_min(0)
            ids, positions = ids[token] * real, positions[token] * real
            mask = real.long().view(layout.shape)
        else:
            mask = torch.ones(layout.shape, dtype=torch.long, device=ids.device)
        inputs: dict[str, Any] = {"input_ids": ids.view(layout.shape), "attention_mask": mask}
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions.view(layout.shape)
        types = getattr(self._config, "type_vocab_size", None)
        if types and "token_type_ids" in self._takes:
            # A model's own default is only as long as its positions.
            inputs["token_type_ids"] = self._types(batch) if types > 1 else torch.zeros_like(mask)
        if "use_cache" in self._takes:
            return {**inputs, "use_cache": False}
        return inputs

    def _types(self, batch: PreparedBatch) -> torch.Tensor:
        """The type of each token in the model's input: 1 in the second of two texts."""
        layout = batch.layout
        types = torch.zeros(layout.shape, dtype=torch.long, device=batch.ids.device)
        if batch.types is not None:
            types.view(-1)[layout.cell.to(types.device)] = batch.types.to(types.device)
        return types

    def _check_rope(self, offsets: torch.Tensor) -> None:
        """Refuse what would be wrong in silence: rotary scales that follow the longest segment of a batch."""
        limit = _rope_limit(self._config)
        if limit is not None and len(offsets) > 2 and int(offsets.diff().max()) > limit:
            raise BaseModelError(
                f"{type(self.model).__name__} rescales its positions for the whole batch once a segment is longer than {limit} "
                f"tokens, so its neighbours would change; keep segments within {limit} tokens, or run this one alone"
            )


def _body(model: Any) -> torch.nn.Module:
    """The part whose output the head sees: the decoder inside, where it is a model of its own (as in OPT). A decoder may itself be a
    language model with a head (as in Llama 4); then it is the part inside that."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    found: torch.nn.Module = getattr(model, "base_model", model)
    if hasattr(decoder, "config") and "input_ids" in inspect.signature(decoder.forward).parameters:
        found = decoder
    while (inside := _below_head(found)) is not None:
        found = inside
    return found


def _below_head(model: Any) -> torch.nn.Module | None:
    """The model inside one that has an output layer of its own; None for a model without."""
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        return None
    inner = (child for child in model.children() if hasattr(child, "config"))
    return next((child for child in inner if "input_ids" in inspect.signature(child.forward).parameters), None)


def _rope_limit(config: Any) -> int | None:
    """The position from which on rotary scales depend on the longest segment of the batch; None if they never do."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or {}
    limits = []
    # One for all layers, or by type.
    for kind in (rope, *(entry for entry in rope.values() if isinstance(entry, dict))):
        if kind.get("rope_type") in ("longrope", "dynamic"):
            limits.append(int(kind.get("original_max_position_embeddings") or text.max_position_embeddings))
    return min(limits, default=None)
