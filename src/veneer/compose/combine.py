"""Making one adapter of several: an operation at every site, a form that can be written, and the error that this made.

    composition = compose("sum", [Parent(a, 0.5), Parent(b, 0.5)], name="both")
    write_adapter(composition.adapter, folder, receipt=composition.receipt())

Sites are worked on one after the other, so that what is dense is dense for one site only. Each site's result is what the operation says,
in fp64; its error is the distance of the stored adapter's change from it: rounding to fp32, and what was cut off by a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.methods.dora import MAGNITUDE
from veneer.checkpoints.base_files import check_changes_only, check_finite
from veneer.compose.ops import OPERATIONS, Operation, Place, Settings
from veneer.deltas.build import MAX_RANK, Form, Tensors, assemble, site_tensors
from veneer.deltas.delta import SiteDelta, Weights, geometry_of, site_delta, weighted_sum
from veneer.deltas.parents import (
    Parent,
    base_records,
    check_one_base,
    notes_on_bases,
    origin_of,
    probes_on,
    template_of,
)
from veneer.deltas.svd import truncated
from veneer.errors import ComposeError, Problems

CANCELLED = 1e-5
"""The share of its parts below which a sum is rounding: folders hold fp32, and DoRA's change is a difference of larger numbers."""


@dataclass(frozen=True)
class SiteError:
    """One site of a composition. norm: ||d||_F of what the operation makes. error: ||stored - d|| / ||d||."""

    site: str
    rank: int
    norm: float
    error: float


@dataclass
class Composition:
    """A new adapter and how exactly it is what was asked for."""

    adapter: Adapter
    operation: str
    settings: dict[str, Any]
    origin: dict[str, Any]
    """What the receipt says of the parents."""
    sites: list[SiteError]
    notes: list[str] = field(default_factory=list)
    base_weights: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, list[float]] = field(default_factory=dict)
    template: str | None = None
    """The chat template in the parents' folders, where they agree."""

    @property
    def error(self) -> float:
        """||stored - d|| / ||d|| of all sites together."""
        total = math.fsum(site.norm**2 for site in self.sites)
        lost = math.fsum((site.norm * site.error) ** 2 for site in self.sites)
        return math.sqrt(lost / total) if total else 0.0

    def worst(self, count: int = 5) -> list[SiteError]:
        """The sites with the largest error first."""
        return sorted(self.sites, key=lambda site: -site.error)[:count]

    def receipt(self) -> dict[str, Any]:
        """What the folder's receipt says of its origin, beside what it says of any adapter."""
        made = {"operation": self.operation, **self.settings, "error": float(f"{self.error:.3g}")}
        known = {"base": self.base_weights, "probes": self.probes}
        return {**self.origin, "made_by": made, **{key: value for key, value in known.items() if value}}

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **{key: value for key, value in self.receipt().items() if key != "probes"},
            "error": self.error,
            "method": self.adapter.method.name,
            "parameters": self.adapter.num_parameters(),
            "sites": [asdict(site) for site in self.sites],
            "notes": self.notes,
        }


def compose(
    operation: str,
    parents: Sequence[Parent],
    *,
    name: str = "composed",
    weights: Weights | None = None,
    rank: int | None = None,
    energy: float | None = None,
    form: Form = "auto",
    settings: Settings | None = None,
    any_base: bool = False,
) -> Composition:
    """One adapter from several.

    operation: a name in `OPERATIONS`. weights: the base's weights, needed where DoRA takes part. rank: at most this at every site;
    energy: the least rank that keeps this share of ||d||^2 there. form: "auto" writes DoRA where gains take part, else LoRA.
    any_base: put together what was made on different bases.

    Raises ComposeError for parents that do not go together, values that are not finite, ranks that make no sense, and an empty result.
    """
    chosen, settings = _operation(operation), settings or Settings()
    if not math.isfinite(settings.scale):
        raise ComposeError(f"scale: expected a finite number, found {settings.scale}")
    _check(chosen, parents, rank, energy, any_base)
    gains = any(parent.adapter.method.needs_base_weights for parent in parents)
    if gains and weights is None:
        named = next(parent.adapter.name for parent in parents if parent.adapter.method.needs_base_weights)
        raise ComposeError(
            f'the change of the DoRA adapter "{named}" depends on the base weights; give the base (--base MODEL)'
        )
    work = _Work(chosen, parents, weights, rank, energy, settings)
    if form == "auto":
        form = "dora" if gains and chosen.exact else "lora"
    tied = _tied(parents, form)
    tensors: dict[str, Tensors] = {}
    kinds: dict[str, str] = {}
    sites = []
    for site in work.sites():
        exact = work.exact(site)
        tensors[site] = site_tensors(
            site, work.reduced(site, exact, form), work.weight(site) if form == "dora" else None
        )
        kinds[site] = exact.geometry.kind
        if tensors[site]:
            sites.append(work.measure(site, exact, tensors[site]))
    _check_something_is_left(work, sites, tensors)
    adapter = assemble(tensors, kinds, name, tied=tied)
    origin, left_out = origin_of(parents), len(tensors) - len(sites)
    notes = [f"nothing is left at {left_out} sites, which the new adapter leaves alone"] if left_out else []
    records = {site: record for parent in reversed(parents) for site, record in base_records(parent.adapter).items()}
    return Composition(
        adapter,
        operation,
        _said(chosen, settings, rank, energy),
        origin,
        sites,
        notes + _notes(parents, chosen) + notes_on_bases(parents) + origin.get("notes", []),
        {site: record for site, record in records.items() if site in adapter.tensors},
        probes_on(adapter, weights) if adapter.method.needs_base_weights and weights is not None else {},
        template_of(parents),
    )


class _Work:
    """One composition: what it is asked, site by site."""

    def __init__(
        self,
        operation: Operation,
        parents: Sequence[Parent],
        weights: Weights | None,
        rank: int | None,
        energy: float | None,
        settings: Settings,
    ) -> None:
        self.operation, self.parents, self.weights = operation, parents, weights
        self.rank, self.energy, self.settings = rank, energy, settings
        self._weight: tuple[str, Tensor] | None = None

    def sites(self) -> list[str]:
        """Sites of the result, in the order in which parents name them."""
        parents = self.parents if self.operation.over == "all" else self.parents[:1]
        return list(dict.fromkeys(site for parent in parents for site in parent.adapter.tensors))

    def exact(self, site: str) -> SiteDelta:
        """What the operation makes of the parents at a site."""
        parts, weights = self._parts(site)
        change = self.operation.function(parts, weights, Place(site, self.settings, lambda: self.weight(site)))
        return change if self.settings.scale == 1 else change.scaled(self.settings.scale)

    def reduced(self, site: str, change: SiteDelta, form: str) -> SiteDelta:
        """The change in a form that can be stored: cut to the rank asked for, and of a rank where it is dense."""
        if form == "dora" and change.dense_OK is None:
            # The gain stays whole; what stands beside it is cut.
            factors = SiteDelta(change.geometry, change.terms)
            if factors.rank and (self.energy is not None or (self.rank is not None and self.rank < factors.rank)):
                factors = truncated(factors, rank=self.rank, energy=self.energy)
            return SiteDelta(change.geometry, factors.terms, change.gain_O)
        limit = self.limit(site)
        if change.factored and self.energy is None and change.rank <= limit:
            return change
        return truncated(change, rank=limit, energy=self.energy, weight_OK=self.weight(site))

    def limit(self, site: str) -> int:
        """The rank that was asked for; else that of the parents together, or with a share of energy what the layer can have."""
        if self.rank is not None:
            return self.rank
        acting = [parent.adapter for parent in self.parents if site in parent.adapter.tensors]
        if self.energy is not None:
            return min(MAX_RANK, geometry_of(acting[0], site).out)
        return sum(adapter.rank(site) for adapter in acting)

    def weight(self, site: str) -> Tensor | None:
        """The base weight at a site, where the base is known; the last one is kept."""
        if self.weights is None:
            return None
        if self._weight is None or self._weight[0] != site:
            self._weight = (site, self.weights(site))
        return self._weight[1]

    def measure(self, site: str, exact: SiteDelta, tensors: Tensors) -> SiteError:
        """How far the stored change is from the exact one; an operation on factors is held against the sum of the changes."""
        if self.operation.factor_wise:
            exact = weighted_sum(*self._parts(site)).scaled(self.settings.scale)
        one = assemble({site: tensors}, {site: exact.geometry.kind}, "stored")
        apart = exact - site_delta(one, site, self._held)
        weight_OK = None if apart.factored else self.weight(site)
        norm = exact.norm(weight_OK if exact.needs_base else None)
        return SiteError(site, one.rank(site), norm, apart.norm(weight_OK) / norm if norm else 0.0)

    def _parts(self, site: str) -> tuple[list[SiteDelta], list[float]]:
        acting = [parent for parent in self.parents if site in parent.adapter.tensors]
        # An adapter that is given twice is one value, so that it can cancel itself.
        each = {id(p.adapter): p.adapter for p in acting}
        made = {key: site_delta(adapter, site, self._held) for key, adapter in each.items()}
        return [made[id(parent.adapter)] for parent in acting], [parent.weight for parent in acting]

    def size_of_parts(self, site: str) -> float:
        """The norm that the weighted changes have one by one, as if they were orthogonal."""
        weight_OK = self.weight(site)
        return math.hypot(*(w * part.norm(weight_OK) for part, w in zip(*self._parts(site), strict=True)))

    @property
    def _held(self) -> Weights | None:
        return None if self.weights is None else self._known

    def _known(self, site: str) -> Tensor:
        weight = self.weight(site)
        assert weight is not None
        return weight


def _check_something_is_left(work: _Work, sites: Sequence[SiteError], tensors: Mapping[str, Tensors]) -> None:
    """Changes that cancel leave rounding, and factors too small for fp32 leave nothing; neither must pass for an adapter."""
    if sites and not any(MAGNITUDE in tensors[site.site] or _moved(tensors[site.site]) for site in sites):
        raise ComposeError(
            "nothing is left: the change is smaller than fp32 can hold at every site; give larger weights"
        )
    if sites and any(parent.weight < 0 for parent in work.parents):
        parts = math.hypot(*(work.size_of_parts(site.site) for site in sites))
        if math.hypot(*(site.norm for site in sites)) < CANCELLED * parts:
            raise ComposeError("nothing is left: the changes cancel each other up to rounding")


def _operation(name: str) -> Operation:
    if name not in OPERATIONS:
        raise ComposeError(f"there is no operation {name!r}; there are {', '.join(OPERATIONS)}")
    return OPERATIONS[name]


def _check(
    operation: Operation, parents: Sequence[Parent], rank: int | None, energy: float | None, any_base: bool
) -> None:
    if not parents:
        raise ComposeError("there is nothing to compose: give at least one adapter")
    for parent in parents:
        if not math.isfinite(parent.weight):
            raise ComposeError(f'the weight of "{parent.adapter.name}" is {parent.weight}; expected a finite number')
    for adapter in {id(parent.adapter): parent.adapter for parent in parents}.values():
        check_changes_only(adapter)
        check_finite(adapter)
        if not adapter.method.needs_base_weights and not any(_moved(own) for own in adapter.tensors.values()):
            raise ComposeError(
                f'the adapter "{adapter.name}" changes nothing: its B is zero at every site (never trained?)'
            )
    if not any_base:
        check_one_base([parent.adapter for parent in parents])
    _check_geometry(parents)
    if energy is not None and not 0 < energy <= 1:
        raise ComposeError(f"energy: expected a share above 0 and up to 1, found {energy:g}")
    if rank is not None:
        _check_rank(operation, parents, rank)


def _moved(own: Mapping[str, Tensor]) -> bool:
    """Whether both factors hold something."""
    return all(bool(own[key].any()) for key in own if key != MAGNITUDE)


def _check_geometry(parents: Sequence[Parent]) -> None:
    problems = Problems()
    first: dict[str, tuple[str, Geometry]] = {}
    for parent in parents:
        for site in parent.adapter.tensors:
            geometry = geometry_of(parent.adapter, site)
            name, known = first.setdefault(site, (parent.adapter.name, geometry))
            if known != geometry:
                problems.add(f'{site}: {known} in "{name}", {geometry} in "{parent.adapter.name}"')
    problems.raise_if_any(ComposeError, "the adapters are of layers of different shapes, so they are not of one base")


def _tied(parents: Sequence[Parent], form: str) -> bool:
    """Whether the embedding's change acts on the tied head too, in every parent that has one."""
    said = {p.adapter.method.ensure_weight_tying for p in parents if "embedding" in p.adapter.kinds.values()}
    if len(said) > 1 or (True in said and form == "dora"):
        raise ComposeError(
            "some of these adapters act on the tied head through their embedding's factors (ensure_weight_tying) and others cannot, "
            "so no one adapter does what they do together; merge them instead (veneer merge)"
        )
    return said == {True}


def _check_rank(operation: Operation, parents: Sequence[Parent], rank: int) -> None:
    if rank < 1:
        raise ComposeError(f"rank: expected 1 or more, found {rank}")
    most = 0
    dense = any(parent.adapter.method.needs_base_weights for parent in parents) or operation.name in ("ties", "dare")
    for site in {site for parent in parents for site in parent.adapter.tensors}:
        acting = [parent.adapter for parent in parents if site in parent.adapter.tensors]
        geometry = geometry_of(acting[0], site)
        full = min(geometry.out, geometry.fan_in)
        most = max(most, full if dense else min(full, sum(adapter.rank(site) for adapter in acting)))
    if rank > most:
        raise ComposeError(
            f"rank {rank} is above what the result can have: {most} at most; leave --rank out to keep everything"
        )


def _said(operation: Operation, settings: Settings, rank: int | None, energy: float | None) -> dict[str, Any]:
    """The settings that had a say."""
    own = {"ties": ("density",), "dare": ("drop", "seed"), "outside": ("side",)}.get(operation.name, ())
    said: dict[str, Any] = {key: getattr(settings, key) for key in own}
    if settings.scale != 1:
        said["scale"] = settings.scale
    return {**said, **{key: value for key, value in (("rank", rank), ("energy", energy)) if value is not None}}


def _notes(parents: Sequence[Parent], operation: Operation) -> list[str]:
    sets = [set(parent.adapter.tensors) for parent in parents]
    notes = []
    if operation.over == "all" and (partly := set().union(*sets) - sets[0].intersection(*sets)):
        notes.append(f"{len(partly)} sites are adapted by some of the parents only; the others count as zero there")
    if operation.factor_wise:
        notes.append(
            "factors were added, not changes; the error says how far this is from its own definition, not from the sum"
        )
    return notes
