"""outside: what of the first adapter lies outside the others.

    (I - U U^T) d (I - V V^T),      U spans what the others write, V what they read

``side`` "out" projects the outputs only, "in" the inputs only. What is left has inner products of zero with every column (row) of the
others, so adding it to them disturbs nothing that they do on that side. Weights of the others say nothing here; that of the first
scales the result. At a site where the others span everything, nothing is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from veneer.compose.ops.base import Operation, Place
from veneer.deltas.delta import SiteDelta, Term
from veneer.deltas.svd import alive, svd_of
from veneer.errors import ComposeError


def _outside(parts: Sequence[SiteDelta], weights: Sequence[float], place: Place) -> SiteDelta:
    side = place.settings.side
    if side not in ("both", "out", "in"):
        raise ComposeError(f"side: expected both, out or in, found {side!r}")
    first, others = parts[0], parts[1:]
    if not others:
        return first.scaled(weights[0])
    weight_OK = None if all(part.factored for part in parts) else place.weight()
    b_OR, a_RK = _factors(first, weight_OK)
    spaces = [_spaces(other, weight_OK) for other in others]
    before = float(b_OR.norm() * a_RK.norm())
    if side != "in":
        b_OR = _without(b_OR, [u for u, _ in spaces])
    if side != "out":
        a_RK = _without(a_RK.T, [v for _, v in spaces]).T
    left = SiteDelta(first.geometry, (Term(1.0, b_OR, a_RK),)).scaled(weights[0])
    # What is left after taking everything away is rounding, and must not pass for a change.
    return left if float(b_OR.norm() * a_RK.norm()) > 1e-12 * before else replace(left, terms=())


def _factors(part: SiteDelta, weight_OK: Tensor | None) -> tuple[Tensor, Tensor]:
    if part.factored:
        return part.factors()
    u, s, vt = svd_of(part, weight_OK)
    return u * s, vt


def _spaces(other: SiteDelta, weight_OK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Orthonormal columns: what a change writes, and what it reads."""
    u, s, vt = svd_of(other, weight_OK)
    some = alive(s)
    return u[:, some], vt[some].T


def _without(columns: Tensor, spaces: Sequence[Tensor]) -> Tensor:
    joint = torch.cat(list(spaces), dim=1)
    if not joint.shape[1]:
        return columns
    basis, s, _ = torch.linalg.svd(joint, full_matrices=False)
    basis = basis[:, s > 1e-10 * s.max()]
    for _ in range(2):  # once more, because the first time leaves rounding of what was taken away
        columns = columns - basis @ (basis.T @ columns)
    return columns


OPERATION = Operation("outside", "what of the first adapter lies outside the others", _outside, over="first")
