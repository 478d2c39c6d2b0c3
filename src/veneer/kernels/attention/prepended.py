"""Keys and values before the segments of a flat batch, as prefix tuning has them.

A segment's queries see its own n keys and values first, then those of its tokens: attention of a segment that is n positions longer and
whose first n queries are not asked. So the segments are extended, any form of attention runs on them, and the first n outputs of each are
dropped. Segments without a prefix stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from veneer.kernels.attention.segments import Segments

__all__ = ["Prepended"]


@dataclass(frozen=True, eq=False)
class Prepended:
    """The tensors before the segments of one flat batch.

    Attributes:
        bounds: S + 1 ascending token numbers of the segments.
        rows: for each segment the embeddings [n, D] of its first n tokens, in place of those of their ids; None for none.
        past: for each segment its keys and values [n, 2 L, W] for L layers, keys before values; None for none.
    """

    bounds: tuple[int, ...]
    rows: tuple[Tensor | None, ...]
    past: tuple[Tensor | None, ...]

    @property
    def has_past(self) -> bool:
        """True if a segment has keys and values before it."""
        return any(each is not None for each in self.past)

    def embedded(self, embedded_TD: Tensor) -> Tensor:
        """The embeddings [..., T, D] with the rows of the segments' first tokens."""
        pairs = [(start, rows) for start, rows in zip(self.bounds, self.rows, strict=False) if rows is not None]
        if not pairs:
            return embedded_TD
        index = torch.cat([torch.arange(start, start + len(rows)) for start, rows in pairs]).to(embedded_TD.device)
        rows_ND = torch.cat([rows for _, rows in pairs]).to(embedded_TD.dtype)
        return embedded_TD.index_copy(-2, index, rows_ND.expand(*embedded_TD.shape[:-2], -1, -1))

    @cached_property
    def segments(self) -> Segments:
        """The extended segments."""
        lengths = [b - a for a, b in pairwise(self.bounds)]
        extended = (n + (0 if past is None else len(past)) for n, past in zip(lengths, self.past, strict=True))
        return Segments((0, *accumulate(extended)))

    @cached_property
    def kept(self) -> Tensor:
        """The tokens of the batch among those of the extended segments, [T]."""
        spans = [
            (end - (b - a), end) for (a, b), end in zip(pairwise(self.bounds), self.segments.bounds[1:], strict=True)
        ]
        return torch.cat([torch.arange(a, b) for a, b in spans])

    def queries(self, q_HTD: Tensor) -> Tensor:
        """Queries with zeros before each segment."""
        return self._extended(
            q_HTD,
            [None if past is None else q_HTD.new_zeros(len(q_HTD), len(past), q_HTD.shape[-1]) for past in self.past],
        )

    def keys(self, k_GTD: Tensor, layer: int) -> Tensor:
        """Keys with those before each segment."""
        return self._extended(k_GTD, [self._heads(past, 2 * layer, k_GTD) for past in self.past])

    def values(self, v_GTE: Tensor, layer: int) -> Tensor:
        """Values with those before each segment."""
        return self._extended(v_GTE, [self._heads(past, 2 * layer + 1, v_GTE) for past in self.past])

    def _heads(self, past: Tensor | None, at: int, like_GTD: Tensor) -> Tensor | None:
        if past is None:
            return None
        flat_nW = past[:, at].to(like_GTD)
        return flat_nW.view(len(past), len(like_GTD), like_GTD.shape[-1]).transpose(0, 1)

    def _extended(self, x_GTD: Tensor, before: Sequence[Tensor | None]) -> Tensor:
        pieces: list[Tensor] = []
        for (a, b), head in zip(pairwise(self.bounds), before, strict=True):
            pieces += [x_GTD[:, a:b]] if head is None else [head, x_GTD[:, a:b]]
        return torch.cat(pieces, dim=1)
