"""outside: the part of the first adapter's delta that lies outside the others.

    (I - U U^T) d (I - V V^T),      U spans the others' output directions, V their input directions

``side`` "out" projects the outputs only, "in" the inputs only. The result has inner products of zero with every column (row) of the
others, so adding it to them changes nothing that they do on that side. The others' weights have no effect; the first one's weight scales
the result. A delta with a gain (DoRA) has full rank and spans all outputs where O <= K and all inputs where K <= O: nothing is left there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.kinds import Geometry
from veneer.compose.ops.base import Operation, OperationSettings, SiteContext
from veneer.deltas.delta import LowRankTerm, SiteDelta, geometry_of
from veneer.deltas.svd import nonzero, svd_of
from veneer.errors import ComposeError


def _outside(parts: Sequence[SiteDelta], weights: Sequence[float], context: SiteContext) -> SiteDelta:
    side = context.settings.side
    first, others = parts[0], parts[1:]
    if not others:
        return first.scaled(weights[0])
    nothing = SiteDelta(first.geometry)
    if any(not other.factored and _spans_everything(first.geometry, side) for other in others):
        return nothing
    weight_OK = None if all(part.factored for part in parts) else context.weight()
    dense = None if first.factored else first.dense(weight_OK)
    b_OR, a_RK = first.factors() if dense is None else (dense, None)
    before = float(b_OR.norm()) * (1.0 if a_RK is None else float(a_RK.norm()))
    if side != "in":
        b_OR = _without(b_OR, [_column_space(other, weight_OK, outputs=True) for other in others])
    if side != "out":
        inputs = [_column_space(other, weight_OK, outputs=False) for other in others]
        if a_RK is None:
            b_OR = _without(b_OR.T, inputs).T
        else:
            a_RK = _without(a_RK.T, inputs).T
    after = float(b_OR.norm()) * (1.0 if a_RK is None else float(a_RK.norm()))
    # The rest of a delta that was removed completely is rounding, and must not pass for a change.
    if after <= 1e-12 * before:
        return nothing
    left = SiteDelta(first.geometry, dense_OK=b_OR)
    if a_RK is not None:
        left = SiteDelta(first.geometry, (LowRankTerm(1.0, b_OR, a_RK),))
    return left.scaled(weights[0])


def _spans_everything(geometry: Geometry, side: str) -> bool:
    """A delta of full rank at this site leaves nothing outside itself."""
    return {"both": True, "out": geometry.out <= geometry.fan_in, "in": geometry.fan_in <= geometry.out}[side]


def _check(adapters: Sequence[Adapter], settings: OperationSettings, limit: Callable[[str], float]) -> None:
    side = settings.side
    if side not in ("both", "out", "in"):
        raise ComposeError(f"side: expected both, out or in, found {side!r}")
    first, others = adapters[0], [adapter for adapter in adapters[1:] if adapter.method.needs_base_weights]
    covered = [
        any(site in other.tensors for other in others) and _spans_everything(geometry_of(first, site), side)
        for site in first.tensors
    ]
    if covered and all(covered):
        remedy = "give --side out or --side in, or use LoRA adapters" if side == "both" else "use LoRA adapters"
        raise ComposeError(
            f'nothing is left: the change of the {others[0].method.label} adapter "{others[0].name}" has full rank, so no part of '
            f'"{first.name}" lies outside it; {remedy} as the others'
        )


def _column_space(other: SiteDelta, weight_OK: Tensor | None, *, outputs: bool) -> Tensor:
    """Orthonormal columns that span the output (or input) directions of a delta."""
    if not other.factored:
        dense = other.dense(weight_OK)
        return _basis(dense if outputs else dense.T)
    u, s, vt = svd_of(other)
    kept = nonzero(s)
    return u[:, kept] if outputs else vt[kept].T


def _basis(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, by QR where they are clearly independent."""
    q, r = torch.linalg.qr(columns)
    size = r.diagonal().abs()
    if columns.shape[0] >= columns.shape[1] and bool(size.min() > 1e-6 * size.max()):
        basis: Tensor = q
    else:
        u, s, _ = torch.linalg.svd(columns, full_matrices=False)
        basis = u[:, s > 1e-10 * s.max()]
    return basis


def _without(columns: Tensor, spaces: Sequence[Tensor]) -> Tensor:
    basis = spaces[0] if len(spaces) == 1 else torch.cat(list(spaces), dim=1)
    if not basis.shape[1]:
        return columns
    if len(spaces) > 1:
        basis = _basis(basis)
    for _ in range(2):  # twice, because the first time leaves rounding of the removed part
        columns = columns - basis @ (basis.T @ columns)
    return columns


OPERATION = Operation(
    "outside",
    "the part of the first adapter that lies outside the others",
    _outside,
    over="first",
    options=("side",),
    check=_check,
)
