"""The delta of an adapter at a site, as a value that is closed under sums and scaling.

    W' - W  =  sum_i c_i B_i A_i  +  diag(g) W  +  D

LoRA is one term, c = s. DoRA is one term and a gain: with S = m / ||W + s B A||_row its delta is (S - 1) W + S s B A, so g = S - 1 and
its B takes S. Both stay factored: sums concatenate terms and add gains, exactly, without a matrix of size out x in. D is for deltas that
are dense by nature (an elementwise operation, a difference of weights).

A term keeps the tensors that it came from and a coefficient beside them, so a parent that is subtracted from a sum cancels exactly, and
weights are not rounded into factors before they are written.

Shapes: O out, K in (times the kernel), R rank; W is seen as [O, K], as layer kinds see it. Everything computed here is fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.methods import low_rank
from veneer.deltas.linalg import factored_norm
from veneer.errors import ComposeError

Weights = Callable[[str], Tensor]
"""A site's base weight as [out, in], in any dtype; called when it is needed, so one weight at a time is in memory."""


@dataclass(frozen=True, eq=False)
class LowRankTerm:
    """coefficient * b @ a."""

    coefficient: float
    b_OR: Tensor
    a_RK: Tensor

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.b_OR.shape[1]


@dataclass(frozen=True, eq=False)
class SiteDelta:
    """The delta at one site. ``gain_O`` multiplies the rows of the base weight, fp64."""

    geometry: Geometry
    terms: tuple[LowRankTerm, ...] = ()
    gain_O: Tensor | None = None
    dense_OK: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, K)."""
        return self.geometry.out, self.geometry.fan_in

    @property
    def rank(self) -> int:
        """Columns of all factors together; a gain and a dense part are not counted."""
        return sum(term.rank for term in self.terms)

    @property
    def factored(self) -> bool:
        """The delta has factors only."""
        return self.gain_O is None and self.dense_OK is None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(b [O, R], a [R, K]) with b @ a the factored part, fp64; the coefficients are in a."""
        if not self.terms:
            out, in_ = self.shape
            return torch.zeros(out, 0, dtype=torch.float64), torch.zeros(0, in_, dtype=torch.float64)
        b_OR = torch.cat([term.b_OR.detach().double() for term in self.terms], dim=1)
        a_RK = torch.cat([term.coefficient * term.a_RK.detach().double() for term in self.terms])
        return b_OR, a_RK

    def dense(self, weight_OK: Tensor | None = None) -> Tensor:
        """The delta as a matrix [O, K], fp64. Raises ComposeError where the base weight is needed and not given."""
        if self.dense_OK is not None and not self.terms and self.gain_O is None:
            return self.dense_OK.double()
        b_OR, a_RK = self.factors()
        delta = b_OR @ a_RK
        if self.dense_OK is not None:
            delta += self.dense_OK.double()
        if self.gain_O is not None:
            if weight_OK is None:
                raise ComposeError("the change depends on the base weights; give the base (--base MODEL)")
            delta.addcmul_(self.gain_O.unsqueeze(1), weight_OK.double())
        return delta

    def norm(self, weight_OK: Tensor | None = None) -> float:
        """Frobenius norm, through the factors where there is nothing else."""
        return factored_norm(*self.factors()) if self.factored else float(self.dense(weight_OK).norm())

    def scaled(self, by: float) -> SiteDelta:
        """This delta times a number."""
        if by == 0:
            return SiteDelta(self.geometry)
        return SiteDelta(
            self.geometry,
            tuple(replace(term, coefficient=by * term.coefficient) for term in self.terms),
            None if self.gain_O is None else by * self.gain_O,
            None if self.dense_OK is None else by * self.dense_OK,
        )

    def __add__(self, other: SiteDelta) -> SiteDelta:
        """The exact sum: terms are concatenated, and a term of both is counted once with both coefficients."""
        if self.geometry != other.geometry:
            raise ComposeError(
                f"changes of layers of different shapes cannot be added: {self.geometry}, {other.geometry}"
            )
        terms: dict[tuple[int, int], LowRankTerm] = {}
        for term in (*self.terms, *other.terms):
            key = (id(term.b_OR), id(term.a_RK))
            first = terms.get(key)
            terms[key] = term if first is None else replace(first, coefficient=first.coefficient + term.coefficient)
        kept = tuple(term for term in terms.values() if term.coefficient)
        return SiteDelta(self.geometry, kept, _plus(self.gain_O, other.gain_O), _plus(self.dense_OK, other.dense_OK))

    def __sub__(self, other: SiteDelta) -> SiteDelta:
        return self + other.scaled(-1.0)


def geometry_of(adapter: Adapter, site: str) -> Geometry:
    """The shapes of a site, from the adapter's own tensors."""
    kind = adapter.kinds[site]
    method = low_rank(adapter.method, f'the adapter "{adapter.name}" has no low-rank change')
    a, b = (adapter.tensors[site][name] for name in method.factor_names(kind))
    kernel = (int(a.shape[2]), int(a.shape[3])) if kind == "conv2d" else (1, 1)
    return Geometry(kind, int(b.shape[0]), int(a.shape[1]), kernel)


def site_delta(adapter: Adapter, site: str, weights: Weights | None = None) -> SiteDelta:
    """The delta of an adapter at a site.

    Terms hold the adapter's own tensors where they can, so two deltas of one adapter are known to be the same.

    Raises:
        ComposeError: the delta depends on the base weights and ``weights`` is not given.
    """
    method = low_rank(adapter.method, f'the adapter "{adapter.name}" has no low-rank change')
    if method.needs_base_weights and weights is None:
        raise needs_base(adapter)
    weight_OK = weights(site) if method.needs_base_weights and weights is not None else None
    gain_O, a_RK, b_OR, coefficient = method.delta_parts(adapter.tensors[site], adapter.scale(site), weight_OK)
    return SiteDelta(geometry_of(adapter, site), (LowRankTerm(coefficient, b_OR, a_RK),), gain_O)


def needs_base(adapter: Adapter) -> ComposeError:
    """The error for an adapter whose delta cannot be known without the base."""
    return ComposeError(
        f'the change of the {adapter.method.label} adapter "{adapter.name}" depends on the base weights; give the base (--base MODEL)'
    )


def weighted_sum(parts: Sequence[SiteDelta], weights: Sequence[float]) -> SiteDelta:
    """sum_i w_i delta_i, exact for every method."""
    total = SiteDelta(parts[0].geometry)
    for part, weight in zip(parts, weights, strict=True):
        total = total + part.scaled(weight)
    return total


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    total = one + other
    return total if bool(total.any()) else None
