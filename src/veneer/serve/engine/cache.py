"""Keys and values of all sequences: one tensor per attention layer, a row per slot, and attention of a step over them.

Slot s is place s % size of block s // size. Layers are numbered in the order in which a pass calls them.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.attention.paged import Context, paged_attention
from veneer.kernels.attention.segmented import segment_attention
from veneer.kernels.attention.segments import Pattern, Segments
from veneer.models.flat_attention import NotFlat
from veneer.serve.engine.scheduler import Chunk


class PagedCache:
    """Keys and values for ``blocks`` blocks of ``size`` tokens; tensors are made when a layer first needs them."""

    def __init__(self, blocks: int, size: int) -> None:
        self.slots = blocks * size
        self.size = size
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.scale: float | None = None
        """Factor of the scores, if attention is plain (no soft cap or sinks) with one factor in all layers; else None."""
        self._kinds: dict[int, set[tuple[Pattern, float, bool]]] = {}

    def saw(self, number: int, pattern: Pattern, scale: float, *, sinks: bool) -> None:
        """Note a kind of attention that a layer computes."""
        kinds = self._kinds.setdefault(number, set())
        kind = (pattern, scale, sinks)
        if kind not in kinds:
            kinds.add(kind)
            every = [one for found in self._kinds.values() for one in found]
            plain = all(one == (Pattern(before=one[0].before), scale, False) for one in every)
            self.scale = scale if plain and len(every) == len(self._kinds) else None

    @property
    def reaches(self) -> list[int | None]:
        """Tokens back that each layer attends to, None for all, where attention is plain."""
        return [next(iter(self._kinds[number]))[0].before for number in range(len(self.layers))]

    def layer(self, number: int, k_TGD: Tensor, v_TGE: Tensor) -> tuple[Tensor, Tensor]:
        """(keys [S, G, D], values [S, G, E]) of a layer, shaped as these keys and values are."""
        while number >= len(self.layers):
            self.layers.append(
                (k_TGD.new_empty(self.slots, *k_TGD.shape[1:]), v_TGE.new_empty(self.slots, *v_TGE.shape[1:]))
            )
        return self.layers[number]

    def geometry(self) -> dict[str, Any]:
        """Sizes and scale with which `restore` makes the layers of a model with plain attention."""
        shapes = [[list(part.shape[1:]) for part in layer] for layer in self.layers]
        return {"layers": shapes, "reaches": self.reaches, "scale": self.scale}

    def restore(self, geometry: dict[str, Any], like: Tensor) -> None:
        """Make the layers as a model would, with the dtype and the device of one of its tensors."""
        for number, before in enumerate(geometry["reaches"]):
            self.saw(number, Pattern(before=before), float(geometry["scale"]), sinks=False)
        self.layers[:] = [
            (like.new_empty(self.slots, *keys), like.new_empty(self.slots, *values))
            for keys, values in geometry["layers"]
        ]

    def slots_of(self, blocks: Items[int], tokens: int) -> Tensor:
        """Slots [tokens] of a sequence with these blocks."""
        first = torch.tensor(blocks)[:, None] * self.size
        return (first + torch.arange(self.size)).flatten()[:tokens]


class StepAttention:
    """Attention of one step: writes the new keys and values into the cache and attends over each sequence's own. Made once per step."""

    def __init__(self, cache: PagedCache, chunks: Items[Chunk], device: torch.device) -> None:
        self._cache = cache
        self._contexts: list[Context] = []
        at = 0
        for chunk in chunks:
            slots = cache.slots_of(chunk.sequence.blocks, chunk.start + chunk.count).to(device)
            self._contexts.append(Context(at, at + chunk.count, slots))
            at += chunk.count
        self._slots_T = torch.cat([one.slots[one.first - one.last :] for one in self._contexts])
        fresh = all(chunk.start == 0 for chunk in chunks)
        self._segments = Segments((0, *(one.last for one in self._contexts))) if fresh else None
        """The chunks as segments, where none of them has anything before it."""

    def __call__(
        self,
        number: int,
        q_HTD: Tensor,
        k_GTD: Tensor,
        v_GTE: Tensor,
        pattern: Pattern,
        scale: float,
        sinks_H: Tensor | None,
    ) -> Tensor:
        if pattern.after != 0:
            raise NotFlat("its attention looks ahead, so an answer cannot be written token by token")
        self._cache.saw(number, pattern, scale, sinks=sinks_H is not None)
        k_TGD, v_TGE = k_GTD.transpose(0, 1), v_GTE.transpose(0, 1)
        k_SGD, v_SGE = self._cache.layer(number, k_TGD, v_TGE)
        k_SGD[self._slots_T] = k_TGD
        v_SGE[self._slots_T] = v_TGE
        if self._segments is not None:
            return segment_attention(q_HTD, k_GTD, v_GTE, self._segments, pattern, scale=scale, sinks_H=sinks_H)
        return paged_attention(q_HTD, k_SGD, v_SGE, self._contexts, pattern, scale=scale, sinks_H=sinks_H)
