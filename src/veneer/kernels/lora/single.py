"""One adapter's part in a fast adapted linear call: the low-rank branch on its tokens, forward and backward.

    forward     y_h += w (x A_h^T) (s S B)_h^T
    backward    G = w [g_1 (s S B)_1 | g_2 (s S B)_2 | ...],    dx += G [A_1; A_2; ...],    dA_h = G_h^T x,
                dB_h = s S g_h^T (w x A_h^T),                   dm_h = sum_t g_h (y_h - b_h) / m_h

The products with A, dx and dA are taken for all layers h of the call at once. Dropout acts on the branch's input; the dropped
indices are kept as integers, and each layer has its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.lora.branch import (
    AdapterPart,
    Backward,
    Branch,
    Factors,
    Gradients,
    Reduction,
    Tokens,
    magnitude_gradient,
    put_,
    take,
)
from veneer.kernels.lora.dropout import zero_

__all__ = ["SingleBranch"]


class SingleBranch(AdapterPart, Branch):
    """One adapter's part."""

    def __init__(self, tokens: Tokens, weight: float | Tensor, factors: Sequence[Factors | None]) -> None:
        super().__init__(tokens, weight, factors)
        self.masters: list[Tensor | None] = [master for _, f in self.parts for master in f.masters]
        self.scaled = self.scales
        self._ranks = [f.a.shape[0] for _, f in self.parts]

    def full_magnitude_scale(self, h: int) -> Tensor | None:
        return self.scales.get(h) if self.tokens is None else None

    def run_(self, x_NK: Tensor, y_NO: Sequence[Tensor]) -> list[Tensor | None]:
        """Keeps A of all layers, x A^T (times w), and per layer s S B and the dropped indices."""
        x_nK = take(x_NK, self.tokens)
        a_RK, b_OR = self._fold(x_nK.dtype)
        xa_nR, gone = self._down(x_nK, a_RK)
        for (h, _), b, xa in zip(self.parts, b_OR, self._columns(xa_nR), strict=True):
            part = take(y_NO[h], self.tokens)
            put_(y_NO[h], self.tokens, part.addmm_(xa, b.T))
        return [a_RK, xa_nR, *b_OR, *gone]

    def gradients_(self, back: Backward, kept: Sequence[Tensor | None]) -> Gradients:
        a_RK, xa_nR, b_OR = kept[0], kept[1], kept[2 : 2 + len(self.parts)]
        gone = kept[2 + len(self.parts) :]
        assert a_RK is not None and xa_nR is not None
        g_nO = [None if (g := back.g_NO[h]) is None else take(g, self.tokens) for h, _ in self.parts]
        grads = []
        for g, b in zip(g_nO, b_OR, strict=True):
            assert b is not None
            grads.append(xa_nR.new_zeros(len(xa_nR), b.shape[1]) if g is None else g @ b)
        gb_nR = self._weighted(grads[0] if len(grads) == 1 else torch.cat(grads, dim=1))
        if back.dx_NK is not None:
            self._add_to_(back.dx_NK, gb_nR, a_RK, gone)
        if back.x_NK is None:
            return [None] * len(self.masters)
        x_nK = take(back.x_NK, self.tokens)
        das = self._a_gradients(gb_nR, x_nK, gone)
        xas = self._columns(xa_nR)
        found: Gradients = []
        for (h, f), g, da, xa in zip(self.parts, g_nO, das, xas, strict=True):
            db = dm = None
            if g is not None:
                db = self._b_gradient(h, f, g, xa)
                if h in self.scales:
                    y_NO = back.y_NO[h]
                    assert y_NO is not None
                    y_nO = take(y_NO, self.tokens)
                    dm = magnitude_gradient(Reduction(back.layers[h], f, self.scales[h], g, y_nO, x_nK, xa))
            found += [da.to(f.a.dtype), db, dm]
        return found

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A of all layers and s S B of each, in the compute dtype."""
        if len(self.parts) == 1 or self.parts[0][1].prepared is not None:
            prepared = [f.prepare(dtype) for _, f in self.parts]
            a_RK = prepared[0].a_RK if len(prepared) == 1 else torch.cat([one.a_RK for one in prepared])
            return a_RK, [one.b_OR for one in prepared]
        # Cast once, not layer by layer.
        a_RK = torch.cat([f.a.detach() for _, f in self.parts]).to(dtype)
        return a_RK, [f.scaled_b(self.scales.get(h)).to(dtype) for h, f in self.parts]

    def _columns(self, t_nR: Tensor) -> Sequence[Tensor]:
        return (t_nR,) if len(self.parts) == 1 else t_nR.split(self._ranks, dim=1)

    def _weighted(self, t_nR: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return t_nR * self.weight.to(t_nR.dtype).unsqueeze(1)
        return t_nR if self.weight == 1.0 else t_nR * self.weight

    def _down(self, x_nK: Tensor, a_RK: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """x A^T times w, and the indices that were dropped from x before, per layer."""
        if not self.drops:
            return self._weighted(x_nK @ a_RK.T), [None] * len(self.parts)
        columns, kept = [], []
        for (_, f), a in zip(self.parts, a_RK.split(self._ranks), strict=True):
            gone = f.dropped(x_nK.numel(), x_nK.device)
            columns.append((_without(x_nK, gone) @ a.T).div_(f.kept))
            kept.append(gone)
        return self._weighted(torch.cat(columns, dim=1)), kept

    def _add_to_(self, dx_NK: Tensor, gb_nR: Tensor, a_RK: Tensor, gone: Sequence[Tensor | None]) -> None:
        part = take(dx_NK, self.tokens)
        if not self.drops:
            part.addmm_(gb_nR, a_RK)
        else:
            pieces = zip(self.parts, gone, self._columns(gb_nR), a_RK.split(self._ranks), strict=True)
            for (_, f), dropped, gb, a in pieces:
                dx = gb @ a
                part.add_(dx if dropped is None else zero_(dx, dropped).div_(f.kept))
        put_(dx_NK, self.tokens, part)

    def _a_gradients(self, gb_nR: Tensor, x_nK: Tensor, gone: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """dA of each layer, [R, K]."""
        if not self.drops:
            das_RK = gb_nR.T @ x_nK
            return (das_RK,) if len(self.parts) == 1 else das_RK.split(self._ranks)
        pieces = zip(self.parts, gone, self._columns(gb_nR), strict=True)
        return [(gb.T @ _without(x_nK, dropped)).div_(f.kept) for (_, f), dropped, gb in pieces]

    def _b_gradient(self, h: int, f: Factors, g_nO: Tensor, xa_nR: Tensor) -> Tensor:
        # Contiguous: torch's fused optimizers read a gradient's memory in the parameter's order, whatever its strides say.
        db_OR = (xa_nR.T @ g_nO).to(f.b.dtype).T.contiguous()
        s = self.scales.get(h)
        return db_OR.mul_(f.scale if s is None else (s * f.scale).to(db_OR.dtype).unsqueeze(1))


def _without(x_nK: Tensor, gone: Tensor | None) -> Tensor:
    """x with zeros at the dropped indices."""
    return x_nK if gone is None else zero_(x_nK.clone(memory_format=torch.contiguous_format), gone)
