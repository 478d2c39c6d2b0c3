"""A delta as a value: what an adapter changes at a site, in a form that is closed under sums and scaling.

    W' - W  =  sum_i c_i B_i A_i  +  diag(g) W  +  D

LoRA is one term, c = s. DoRA is one term and a gain: with S = m / ||W + s B A||_row its change is (S - 1) W + S s B A, so g = S - 1 and
its B takes S. Both stay factors: sums concatenate terms and add gains, exactly, and nothing of size out x in is made. D is for what
is dense by its nature (an elementwise operation, a difference of weights).

A term keeps the tensors that it came from and a coefficient beside them, so that a parent taken out of a sum cancels to nothing, and
weights are not rounded into factors before they are written.

Shapes: O out, K in (times the kernel), R rank; W seen as [O, K] as hosts see it. What is computed here is fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.methods.lora import factors_2d
from veneer.deltas.linalg import factored_norm
from veneer.errors import ComposeError

Weights = Callable[[str], Tensor]
"""A site's base weight as [out, in], in any dtype; called when it is needed, so that one weight at a time is in memory."""
_ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Term:
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
    """The change at one site. ``gain_O`` multiplies the rows of the base weight, fp64."""

    geometry: Geometry
    terms: tuple[Term, ...] = ()
    gain_O: Tensor | None = None
    dense_OK: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, K)."""
        return self.geometry.out, self.geometry.fan_in

    @property
    def rank(self) -> int:
        """Columns that its factors have together; the rank of a dense part is not counted."""
        return sum(term.rank for term in self.terms)

    @property
    def factored(self) -> bool:
        """Whether it is factors and nothing else."""
        return self.gain_O is None and self.dense_OK is None

    @property
    def needs_base(self) -> bool:
        """Whether the base weight is needed to know the change."""
        return self.gain_O is not None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(b [O, R], a [R, K]) with b @ a the factored part, fp64; the coefficients stand in a."""
        if not self.terms:
            out, in_ = self.shape
            return torch.zeros(out, 0, dtype=torch.float64), torch.zeros(0, in_, dtype=torch.float64)
        b_OR = torch.cat([term.b_OR.detach().double() for term in self.terms], dim=1)
        a_RK = torch.cat([term.coefficient * term.a_RK.detach().double() for term in self.terms])
        return b_OR, a_RK

    def dense(self, weight_OK: Tensor | None = None) -> Tensor:
        """The change as a matrix [O, K], fp64. Raises ComposeError where the base weight is needed and not given."""
        b_OR, a_RK = self.factors()
        change = b_OR @ a_RK
        if self.dense_OK is not None:
            change += self.dense_OK.double()
        if self.gain_O is not None:
            if weight_OK is None:
                raise ComposeError("the change of a DoRA adapter depends on the base weight; give the base")
            for rows, gain, weight in _blocks(change, self.gain_O, weight_OK):
                rows += gain.unsqueeze(1) * weight.double()
        return change

    def norm(self, weight_OK: Tensor | None = None) -> float:
        """Frobenius norm; through the factors where there is nothing else."""
        return factored_norm(*self.factors()) if self.factored else float(self.dense(weight_OK).norm())

    def scaled(self, by: float) -> SiteDelta:
        """This change times a number."""
        if by == 0:
            return SiteDelta(self.geometry)
        return SiteDelta(
            self.geometry,
            tuple(replace(term, coefficient=by * term.coefficient) for term in self.terms),
            None if self.gain_O is None else by * self.gain_O,
            None if self.dense_OK is None else by * self.dense_OK,
        )

    def __add__(self, other: SiteDelta) -> SiteDelta:
        """The sum, exact: terms stand beside each other, and a term that both have counts once, with both coefficients."""
        if self.geometry != other.geometry:
            raise ComposeError(
                f"changes of layers of other shapes cannot be added: {self.geometry} and {other.geometry}"
            )
        terms: dict[tuple[int, int], Term] = {}
        for term in (*self.terms, *other.terms):
            key = (id(term.b_OR), id(term.a_RK))
            seen = terms.get(key)
            terms[key] = term if seen is None else replace(seen, coefficient=seen.coefficient + term.coefficient)
        kept = tuple(term for term in terms.values() if term.coefficient)
        return SiteDelta(self.geometry, kept, _plus(self.gain_O, other.gain_O), _plus(self.dense_OK, other.dense_OK))

    def __sub__(self, other: SiteDelta) -> SiteDelta:
        return self + other.scaled(-1.0)


def geometry_of(adapter: Adapter, site: str) -> Geometry:
    """The shapes of a site, from the adapter's own tensors."""
    own, kind = adapter.tensors[site], adapter.kinds[site]
    a = own["lora_embedding_A"] if kind == "embedding" else own["lora_A"]
    b = own["lora_embedding_B"] if kind == "embedding" else own["lora_B"]
    kernel = (int(a.shape[2]), int(a.shape[3])) if kind == "conv2d" else (1, 1)
    return Geometry(kind, int(b.shape[0]), int(a.shape[1]), kernel)


def site_delta(adapter: Adapter, site: str, weights: Weights | None = None) -> SiteDelta:
    """What an adapter changes at a site. DoRA needs the base weight.

    The terms hold the adapter's own tensors, so two deltas of one adapter are known to be the same.
    Raises ComposeError where a DoRA adapter comes without its base.
    """
    geometry, scale = geometry_of(adapter, site), adapter.scale(site)
    own: dict[str, Tensor] = {key: value.detach() for key, value in adapter.tensors[site].items()}
    method = adapter.method
    if not method.needs_base_weights:
        first, second = method.tensor_names(geometry.kind)[:2]
        tensors = adapter.tensors[site]
        a, b = tensors[first], tensors[second]
        if geometry.kind == "conv2d":
            a, b = a.flatten(1), b.flatten(1)  # type: ignore[assignment]
        return SiteDelta(geometry, (Term(scale, b, a),))
    if weights is None:
        raise ComposeError(
            f'the change of the DoRA adapter "{adapter.name}" depends on the base weights; give the base (--base MODEL)'
        )
    weight_OK = weights(site)
    a_RK, b_OR = factors_2d(own, torch.float64)
    norms = [
        torch.addmm(weight.double(), rows, a_RK, alpha=scale).norm(dim=1) for rows, weight in _blocks(b_OR, weight_OK)
    ]
    gain_O = method.magnitude_scale({key: value.double() for key, value in own.items()}, torch.cat(norms))
    assert gain_O is not None
    return SiteDelta(geometry, (Term(scale, gain_O.unsqueeze(1) * b_OR, a_RK),), gain_O - 1)


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


def _blocks(*matrices: Tensor) -> list[tuple[Tensor, ...]]:
    """The same rows of several matrices, a block at a time."""
    widest = max(matrix.shape[1] if matrix.dim() > 1 else 1 for matrix in matrices)
    step = max(1, _ELEMENTS_AT_ONCE // widest)
    return list(zip(*(matrix.split(step) for matrix in matrices), strict=True))
