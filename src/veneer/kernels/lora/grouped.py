"""Several adapters' part in a fast adapted linear call, each with few tokens: batched products over padded factors.

With one adapter a row (a decoding step that serves sixteen adapters, say) a loop over adapters costs more than the layer itself. So the
tokens of J adapters are laid out as a grid [J, n], padded by repeating an adapter's own first token, their factors are stacked to
[J, R] padded with zeros, and one batched product does for all:

    forward     y_h += w (x A_h^T) (s S B)_h^T                    on the grid
    backward    as for one adapter (`SingleBranch`), batched over J

The padded factors live for one call, or while nothing is trained and no factor changes (`PaddedFactors`). An optimizer sees masters of
exact rank only. A token meets its own adapter's factors and nothing else, so a NaN stays with its adapter.
Shapes: J adapters, n tokens of each, M = real tokens, K in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.lora.branch import Backward, Branch, Factors, Gradients, Layer, Reduction, magnitude_gradient

__all__ = ["GroupedBranch", "PaddedFactors", "TokenGrid", "pad_factors"]

_FEW = 4
"""Up to so many tokens an adapter, products are taken in the masters' own width: those of few rows are slow in narrow types."""


class TokenGrid:
    """The indices in [N] of the tokens of J adapters, laid out as [J, n].

    Made once for a batch and used by every layer of the same sizes. ``tokens``: each adapter's tokens, LongTensor [n_j] on the CPU, all
    distinct. The grid's own indices are on ``device``.
    """

    def __init__(
        self, tokens: Sequence[Tensor], weights: Sequence[float | Tensor], device: torch.device | str = "cpu"
    ) -> None:
        sizes = [len(indices) for indices in tokens]
        self.sizes = sizes
        self.shape = (len(tokens), max(sizes))
        joined = torch.cat(list(tokens))
        padded = min(sizes) < self.shape[1]
        self.real: Tensor | None = None
        """Flat grid positions that are not padding [M], or None if all are."""
        self.tokens = joined.to(device)
        """The token at each of these positions, [M]."""
        self.index = self.tokens
        """The token at every position, [J * n]."""
        if padded:
            index = torch.cat([torch.cat((one, one[:1].expand(self.shape[1] - len(one)))) for one in tokens])
            real = torch.cat([torch.arange(size) + j * self.shape[1] for j, size in enumerate(sizes)])
            self.index, self.real = index.to(device), real.to(device)
        first, last = int(joined[0]), int(joined[-1])
        runs = not padded and last - first + 1 == len(joined) and bool((joined.diff() == 1).all())
        self.span = slice(first, last + 1) if runs else None
        """The tokens as a slice, where they are consecutive in the order of the grid."""
        self.weight_Jn1 = self._weights(sizes, weights) if padded or any(not _is_one(w) for w in weights) else None

    @property
    def few(self) -> bool:
        """True if products are taken in the masters' own width."""
        return self.shape[1] <= _FEW

    def _weights(self, sizes: list[int], weights: Sequence[float | Tensor]) -> Tensor:
        found = torch.zeros(*self.shape, 1, dtype=torch.float64, device=self.index.device)
        for j, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            found[j, :size, 0] = weight
        return found

    def take(self, t_NX: Tensor) -> Tensor:
        """[J, n, X]: a view where that is possible."""
        t = t_NX[self.span] if self.span is not None else t_NX.index_select(0, self.index)
        return t.view(*self.shape, t_NX.shape[1])

    def put_(self, t_NX: Tensor, part_JnX: Tensor) -> None:
        """Write back what `take` gave, if it was not a view."""
        if self.span is None:
            part = part_JnX.view(-1, t_NX.shape[1])
            t_NX.index_copy_(0, self.tokens, part if self.real is None else part.index_select(0, self.real))

    def weighted(self, t_JnX: Tensor) -> Tensor:
        """Times w; padding becomes zero."""
        return t_JnX if self.weight_Jn1 is None else t_JnX * self.weight_Jn1.to(t_JnX.dtype)


class PaddedFactors(NamedTuple):
    """Factors of J adapters, padded to the largest rank, at those layers of a call where one of them acts.

    present: the layers. a_JKR: A^T of all layers. b_JRO: (s S B)^T per layer. s_J1O: S per layer, or None.
    """

    present: list[int]
    a_JKR: Tensor
    b_JRO: list[Tensor]
    s_J1O: list[Tensor | None]


def pad_factors(factors: Sequence[Sequence[Factors | None]], layers: Sequence[Layer], grid: TokenGrid) -> PaddedFactors:
    """Pad and stack the factors [J][layer] for computing on ``grid``."""
    dtype = layers[0][0].dtype
    present = _present(factors)
    layers = [layers[h] for h in present]
    columns = [[row[h] for row in factors] for h in present]
    a_JRK = torch.cat([_stack_a(column, layer) for column, layer in zip(columns, layers, strict=True)], dim=1)
    if not grid.few:
        a_JRK = a_JRK.to(dtype)
    scales = [_stack_magnitude_scales(column) for column in columns]
    dtype = a_JRK.dtype
    bs = [_stack_b(c, layer, s, dtype) for c, layer, s in zip(columns, layers, scales, strict=True)]
    return PaddedFactors(present, a_JRK.transpose(1, 2).contiguous(), bs, scales)


def _stack_a(column: Sequence[Factors | None], layer: Layer) -> Tensor:
    """[J, R, K]."""
    rank = _rank(column)
    parts = [None if f is None else F.pad(f.a.detach(), (0, 0, 0, rank - len(f.a))) for f in column]
    return torch.stack([_one(column).a.new_zeros(rank, layer[0].shape[1]) if p is None else p for p in parts])


def _stack_b(column: Sequence[Factors | None], layer: Layer, s_J1O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[J, R, O], scale and S included."""
    rank, like = _rank(column), _one(column).b
    parts = [None if f is None else F.pad(f.b.detach(), (0, rank - f.b.shape[1])) for f in column]
    b_JOR = torch.stack([like.new_zeros(len(layer[0]), rank) if p is None else p for p in parts])
    b_JOR = (
        b_JOR
        * torch.tensor([0.0 if f is None else f.scale for f in column], dtype=like.dtype).to(like.device)[:, None, None]
    )
    if s_J1O is not None:
        b_JOR = b_JOR * s_J1O.transpose(1, 2)
    return b_JOR.transpose(1, 2).to(dtype).contiguous()


def _stack_magnitude_scales(column: Sequence[Factors | None]) -> Tensor | None:
    scales = [None if f is None else f.magnitude_scale() for f in column]
    like = next((s for s in scales if s is not None), None)
    if like is None:
        return None
    return torch.stack([torch.ones_like(like) if s is None else s for s in scales]).unsqueeze(1)


def _present(factors: Sequence[Sequence[Factors | None]]) -> list[int]:
    """Layers where one of the adapters acts."""
    return [h for h in range(len(factors[0])) if any(row[h] is not None for row in factors)]


def _one(column: Sequence[Factors | None]) -> Factors:
    return next(f for f in column if f is not None)


def _rank(column: Sequence[Factors | None]) -> int:
    return max(len(f.a) for f in column if f is not None)


def _is_one(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 1.0


class GroupedBranch(Branch):
    """Adapters with few tokens each, as one branch. Without dropout.

    grid: their tokens. factors: [J][layer], None where an adapter leaves a layer alone; not needed where nothing is trained.
    stacked: these, as `pad_factors` makes them.
    """

    def __init__(
        self, grid: TokenGrid, factors: Sequence[Sequence[Factors | None]] | None, stacked: PaddedFactors
    ) -> None:
        self.grid = grid
        self.factors = factors or ()
        self.stacked = stacked
        self.masters: list[Tensor | None] = [m for row in self.factors for f in row if f is not None for m in f.masters]
        self._present = stacked.present
        self._scales = dict(zip(stacked.present, stacked.s_J1O, strict=True))
        self.scaled = {h for h, s in self._scales.items() if s is not None}
        self._ranks = [b.shape[1] for b in stacked.b_JRO]

    def apply_magnitude_(self, h: int, t_NO: Tensor, bias_O: Tensor | None) -> None:
        s = self._scales.get(h)
        if s is not None:
            part = self.grid.take(t_NO)
            less = (s - 1).to(part.dtype)
            part = part.addcmul_(part if bias_O is None else part - bias_O, less)
            self.grid.put_(t_NO, part)

    def run_(self, x_NK: Tensor, y_NO: Sequence[Tensor]) -> list[Tensor | None]:
        """Keeps the padded factors and x A^T (times w)."""
        x_JnK = self.grid.take(x_NK)
        a_JKR = self.stacked.a_JKR
        xa_JnR = self.grid.weighted(torch.bmm(x_JnK.to(a_JKR.dtype), a_JKR))
        for h, b, xa in zip(self._present, self.stacked.b_JRO, self._columns(xa_JnR), strict=True):
            y_JnO = self.grid.take(y_NO[h])
            low = y_JnO.baddbmm_(xa, b) if y_JnO.dtype == b.dtype else y_JnO.add_(torch.bmm(xa, b))
            self.grid.put_(y_NO[h], low)
        return [a_JKR, xa_JnR.to(x_NK.dtype), *self.stacked.b_JRO]

    def _columns(self, t_JnR: Tensor) -> Sequence[Tensor]:
        return (t_JnR,) if len(self._ranks) == 1 else t_JnR.split(self._ranks, dim=2)

    def gradients_(self, back: Backward, kept: Sequence[Tensor | None]) -> Gradients:
        """Gradients of the masters, adapter by adapter, three a layer; dx is added to in place."""
        a_JKR, xa_JnR = kept[0], kept[1]
        assert a_JKR is not None and xa_JnR is not None
        g_JnO = [None if (g := back.g_NO[h]) is None else self.grid.take(g) for h in self._present]
        grads = []
        for g, b, rank in zip(g_JnO, kept[2:], self._ranks, strict=True):
            assert b is not None
            if g is None:
                grads.append(xa_JnR.new_zeros(*self.grid.shape, rank))
            else:
                grads.append(torch.bmm(g.to(b.dtype), b.transpose(1, 2)).to(g.dtype))
        gb_JnR = self.grid.weighted(grads[0] if len(grads) == 1 else torch.cat(grads, dim=2))
        if back.dx_NK is not None:
            self.grid.put_(
                back.dx_NK, self.grid.take(back.dx_NK).baddbmm_(gb_JnR, a_JKR.to(gb_JnR.dtype).transpose(1, 2))
            )
        if back.x_NK is None:
            return [None] * len(self.masters)
        x_JnK = self.grid.take(back.x_NK)
        das = torch.bmm(gb_JnR.transpose(1, 2), x_JnK).split(self._ranks, dim=1)
        pieces = zip(self._present, g_JnO, das, self._columns(xa_JnR), strict=True)
        columns = {h: self._column(h, back, g, da, xa, x_JnK) for h, g, da, xa in pieces}
        return [grad for j, row in enumerate(self.factors) for h, f in enumerate(row) if f for grad in columns[h][j]]

    def _column(
        self, h: int, back: Backward, g_JnO: Tensor | None, da_JRK: Tensor, xa_JnR: Tensor, x_JnK: Tensor
    ) -> list[tuple[Tensor | None, ...]]:
        """(dA, dB, dm) of every adapter at layer h."""
        db_JRO = None if g_JnO is None else torch.bmm(xa_JnR.transpose(1, 2), g_JnO)
        y_NO, scales = back.y_NO[h], self._scales[h]
        y_JnO = None if y_NO is None or scales is None else self.grid.take(y_NO)
        found: list[tuple[Tensor | None, ...]] = []
        for j, row in enumerate(self.factors):
            f = row[h]
            if f is None:
                found.append(())
                continue
            rank = len(f.a)
            da = da_JRK[j, :rank].to(f.a.dtype)
            db, dm = None, None
            if g_JnO is not None and db_JRO is not None:
                # Contiguous: torch's fused optimizers read a gradient's memory in the parameter's order, whatever its strides say.
                db = db_JRO[j, :rank].to(f.b.dtype).T.contiguous()
                db = db.mul_(f.scale if scales is None else (scales[j, 0] * f.scale).to(db.dtype).unsqueeze(1))
                if scales is not None and y_JnO is not None and f.magnitude is not None:
                    n = self.grid.sizes[j]
                    reduction = Reduction(
                        back.layers[h], f, scales[j, 0], g_JnO[j, :n], y_JnO[j, :n], x_JnK[j, :n], xa_JnR[j, :n, :rank]
                    )
                    dm = magnitude_gradient(reduction)
            found.append((da, db, dm))
        return found
