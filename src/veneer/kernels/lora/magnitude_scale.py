"""DoRA's magnitude scale S [out]: multiplying by it, and the reduction in the gradient of its magnitude.

    apply_scale     t S, as t + t (S - 1): S = 1 changes no bit, and what is rounded before the sum is the small difference
    column_dots     sum_t a_to (b_to - c_o), [O], for several pairs at once

The reduction is one pass over memory where it runs compiled. It is tiled over tokens then, because a compiler that reduces over a first
dimension directly walks it column by column.
Shapes: T tokens, O out, K in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.elementwise.compiled import Chain, compiling

__all__ = ["apply_scale", "column_dots", "scale_rows"]

Pair = tuple[Tensor, Tensor, "Tensor | None"]
_TILE = 16


def apply_scale(t_TO: Tensor, s_O: Tensor, out: Tensor | None = None) -> Tensor:
    """t S over the last dimension, in t's dtype."""
    return torch.addcmul(t_TO, t_TO, (s_O - 1).to(t_TO.dtype), out=out)


def scale_rows(weight_OK: Tensor, s_O: Tensor) -> Tensor:
    """S_o W_ok: a new weight."""
    return torch.addcmul(weight_OK, weight_OK, (s_O - 1).to(weight_OK.dtype).unsqueeze(1))


def column_dots(pairs: Sequence[Pair]) -> list[Tensor]:
    """For each (a [T, O], b [T, O], c [O] or None): sum_t a (b - c), [O], summed in fp32 at least; all have the same T."""
    tiles = len(pairs[0][0]) // _TILE
    if tiles < 2 or not compiling():
        return [_dots(*pair) for pair in pairs]
    whole = tiles * _TILE
    tiled = [t[:whole].unflatten(0, (tiles, _TILE)) for a, b, _ in pairs for t in (a, b)]
    shifts = [a.new_zeros(a.shape[1]) if c is None else c for a, _, c in pairs]
    chain = _chains.get(len(pairs))
    if chain is None:
        chain = _chains[len(pairs)] = Chain(tile_dots, 2 * len(pairs))
    found = [dots.sum(0) for dots in chain(*tiled, *shifts)]
    if whole < len(pairs[0][0]):
        found = [dots + _dots(a[whole:], b[whole:], c) for dots, (a, b, c) in zip(found, pairs, strict=True)]
    return found


def tile_dots(*args: Tensor) -> tuple[Tensor, ...]:
    """(a [I, R, O], b, a, b, ..., c [O], c, ...) -> sum_r a_iro (b_iro - c_o), [I, O], in fp32 at least, for each pair."""
    count = len(args) // 3
    found = []
    for i in range(count):
        a, b, c = (
            t.to(torch.promote_types(t.dtype, torch.float32)) for t in (*args[2 * i : 2 * i + 2], args[2 * count + i])
        )
        found.append((a * (b - c)).sum(1))
    return tuple(found)


_chains: dict[int, Chain] = {}


def _dots(a_TO: Tensor, b_TO: Tensor, shift_O: Tensor | None) -> Tensor:
    product = a_TO * (b_TO if shift_O is None else b_TO - shift_O)
    if product.dtype in (torch.float32, torch.float64):
        return product.sum(0)
    # A product with ones sums in fp32 inside, and faster than sum() does for narrow types on a CPU.
    return (product.new_ones(1, len(product)) @ product)[0]
