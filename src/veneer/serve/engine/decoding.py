"""The runner for decoders that a kernel computes whole: single tokens go through it, pieces of prompts through the flat runner."""

from __future__ import annotations

from collections.abc import Sequence as Items
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.adapters import Bank
from veneer.adapters.adapter import Adapter
from veneer.kernels.cpp_library import pays
from veneer.kernels.decoding import DecoderKernel, LowRankLayer, LowRankTable
from veneer.models.flat import FlatRunner
from veneer.serve.engine.decoder_parts import decoder_modules, decoder_weights, rotation_table
from veneer.serve.engine.runner import PagedRunner, Reference, choose_runner, rows_wanted
from veneer.serve.engine.scheduler import Chunk


class DecodingRunner:
    """Sequences that decode in one call of the kernel, all others in one flat call."""

    paged = True
    reason = ""

    def __init__(
        self, model: Any, bank: Bank | None, paged: PagedRunner, kernel: DecoderKernel, positions: int
    ) -> None:
        self._paged = paged
        self._kernel = kernel
        self._bank = bank
        self._places = decoder_modules(model)
        self._layers = 1 + max(layer for layer, _ in self._places.values())
        self._dtype = next(model.parameters()).dtype
        self._cos, self._sin = rotation_table(model, positions)

    def run(self, chunks: Items[Chunk]) -> tuple[Tensor, list[int]]:
        """See `StepRunner`. Rows stand in the order of the chunks."""
        single = [chunk for chunk in chunks if self._takes(chunk)]
        if not single:
            return self._paged.run(chunks)
        decoded = self._decode(single)
        if len(single) == len(chunks):
            return decoded, [1] * len(chunks)
        others = [chunk for chunk in chunks if not self._takes(chunk)]
        logits, counts = self._paged.run(others)
        rows = iter(logits.split(counts))
        ones = iter(decoded.split(1))
        found = [next(ones) if self._takes(chunk) else next(rows).float() for chunk in chunks]
        return torch.cat(found), [len(one) for one in found]

    def _takes(self, chunk: Chunk) -> bool:
        one = chunk.count == 1 and rows_wanted(chunk) == 1
        return one and all(version.prepared is not None for version in chunk.sequence.adapters)

    def _decode(self, chunks: Items[Chunk]) -> Tensor:
        at = torch.tensor([chunk.start for chunk in chunks])
        sequences = [chunk.sequence for chunk in chunks]
        mixes = [
            [(version.prepared, weight) for version, (_, weight) in zip(one.adapters, one.request.mix, strict=True)]
            for one in sequences
        ]
        return self._kernel.step(
            [one.tokens[chunk.start] for chunk, one in zip(chunks, sequences, strict=True)],
            [chunk.start + 1 for chunk in chunks],
            [one.blocks for one in sequences],
            self._cos[at],
            self._sin[at],
            mixes,
        )

    @torch.no_grad()
    def prepare(self, adapter: Adapter) -> LowRankTable | None:
        """An adapter's factors for the kernel; None where it acts elsewhere too, or is being trained."""
        assert self._bank is not None
        trained = any(parameter.requires_grad for parameter in adapter.parameters())
        sites = adapter.sites(self._bank.survey)
        if (
            trained
            or adapter.overrides
            or not adapter.method.low_rank
            or any(site.name not in adapter.tensors for site in sites)
        ):
            return None
        parts: dict[tuple[int, str], LowRankLayer] = {}
        for site in sites:
            place = self._places.get(id(site.module))
            if place is None:
                return None
            tensors, scale, method = adapter.tensors[site.name], adapter.scale(site.name), adapter.method
            a, b = (tensors[name].detach() for name in method.tensor_names(site.kind)[:2])
            norm = method.norm(tensors, site.weight_2d, site.squared_norms(), scale)
            s = None if norm is None else method.magnitude_scale(tensors, norm)
            b = b * scale if s is None else b * (scale * s).to(b.dtype)[:, None]
            parts[place] = LowRankLayer(a, b, None if s is None else s - 1)
        return LowRankTable(self._layers, parts, self._dtype)


class CheckRecord(Protocol):
    """Keeps what the checks of a base found, for its next start."""

    def read(self) -> dict[str, Any]:
        """The stored result; empty if there is none."""

    def write(self, found: dict[str, Any]) -> None:
        """Store a result."""


def fastest_runner(
    model: Any, bank: Bank | None, cache: Any, vocabulary: int, positions: int, record: CheckRecord | None = None
) -> Any:
    """The fastest runner that computes a text piece by piece as the model computes it whole.

    Args:
        model: a causal language model.
        bank: its adapters.
        cache: the engine's blocks.
        vocabulary: number of tokens of the model.
        positions: number of positions of a text.
        record: where the result of the checks is kept. A base that the kernel decodes is not checked again.

    Raises:
        BaseModelError: the model does not generate text.
    """
    known = record.read() if record is not None and pays() else {}
    if known.get("runner") == DecodingRunner.__name__:
        with suppress(Exception):  # a record that does not fit is no record
            return _from_record(model, bank, cache, positions, known)
    reference = Reference(model, bank, cache, vocabulary)
    runner = choose_runner(model, bank, cache, reference)
    if not isinstance(runner, PagedRunner) or not pays() or cache.scale is None:
        return runner
    made = _decoding_runner(model, bank, runner, cache, positions)
    if made is None or not reference.agrees(reference.error(made)):
        return runner
    if record is not None:
        start = runner.flat.first_position
        record.write({"runner": DecodingRunner.__name__, "first_position": start, "cache": cache.geometry()})
    return made


def _from_record(model: Any, bank: Bank | None, cache: Any, positions: int, known: dict[str, Any]) -> DecodingRunner:
    """The runner that passed the checks, with blocks as those made them."""
    flat = FlatRunner(model, probe=False)
    flat.first_position = int(known["first_position"])
    cache.restore(known["cache"], next(model.parameters()))
    made = _decoding_runner(model, bank, PagedRunner(flat, bank, cache), cache, positions)
    if made is None:
        raise ValueError("the record is of another model")
    return made


def _decoding_runner(
    model: Any, bank: Bank | None, paged: PagedRunner, cache: Any, positions: int
) -> DecodingRunner | None:
    """The runner with the kernel, or None if the kernel has no form of this model."""
    weights = decoder_weights(model, cache.scale)
    if weights is None or len(weights.layers) != len(cache.layers):
        return None
    return DecodingRunner(
        model, bank, paged, DecoderKernel(weights, cache.layers, cache.size, cache.reaches), positions
    )
