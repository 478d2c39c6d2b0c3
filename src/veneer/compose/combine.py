"""Making one adapter from several: an operation at every site, in a form that can be stored, with the error of that form.

    composition = combine("sum", [Parent(a, 0.5), Parent(b, 0.5)], name="both")
    write_adapter(composition.adapter, folder, receipt=composition.receipt())

Sites are processed one after the other, so a dense matrix exists for one site at a time. A site's exact result is the operation's, in
fp64; its error is the distance from there to the stored adapter's delta: rounding to fp32, and the part that a rank cuts off.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.methods import LOW_RANK, LoRA, LowRankMethod, Method, low_rank
from veneer.checkpoints.base_files import check_changes_only, check_finite
from veneer.checkpoints.receipt import base_records
from veneer.compose.ops import OPERATIONS, Operation, OperationSettings, SiteContext
from veneer.deltas.build import MAX_RANK, Form, Tensors, assemble, site_tensors
from veneer.deltas.delta import SiteDelta, Weights, geometry_of, needs_base, site_delta, weighted_sum
from veneer.deltas.parallel import map_sites
from veneer.deltas.parents import (
    Parent,
    check_one_base,
    notes_on_parents,
    origin_of,
    records_for,
    target_parameters_of,
    template_of,
)
from veneer.deltas.svd import truncated
from veneer.errors import ComposeError, Problems

CANCELLED = 1e-5
"""The share of its parts below which a sum is rounding: folders hold fp32, and DoRA's delta is a difference of larger numbers."""


@dataclass(frozen=True)
class SiteError:
    """One site of a composition. norm: ||d||_F of the operation's result. error: ||stored - d|| / ||d||."""

    site: str
    rank: int
    norm: float
    error: float


@dataclass
class Composition:
    """A new adapter and its distance from the exact result."""

    adapter: Adapter
    operation: str
    settings: dict[str, Any]
    origin: dict[str, Any]
    """The receipt's entries about the parents."""
    sites: list[SiteError]
    notes: list[str] = field(default_factory=list)
    base_entries: dict[str, Any] = field(default_factory=dict)
    """The receipt's entries about the base."""
    template: str | None = None
    """The chat template in the parents' folders, where they agree."""

    @property
    def error(self) -> float:
        """||stored - d|| / ||d|| over all sites."""
        total = math.fsum(site.norm**2 for site in self.sites)
        lost = math.fsum((site.norm * site.error) ** 2 for site in self.sites)
        return math.sqrt(lost / total) if total else 0.0

    def receipt(self) -> dict[str, Any]:
        """The folder's receipt of its origin, in addition to the entries of every adapter."""
        made = {"operation": self.operation, **self.settings, "error": float(f"{self.error:.3g}")}
        return {**self.origin, "made_by": made, **self.base_entries}

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


def combine(
    operation: str,
    parents: Sequence[Parent],
    *,
    name: str = "composed",
    weights: Weights | None = None,
    rank: int | None = None,
    energy: float | None = None,
    form: Form = "auto",
    settings: OperationSettings | None = None,
    any_base: bool = False,
) -> Composition:
    """Make one adapter from several.

    Args:
        operation: a name in `OPERATIONS`.
        parents: the adapters with their weights.
        name: the new adapter's name.
        weights: the base's weights; required where the delta of a parent depends on them.
        rank: the largest rank at every site.
        energy: keep the least rank with this share of ||d||^2 at every site.
        form: the result's method; "auto" is the parents' method with a magnitude where the result is an exact sum, else LoRA.
        settings: the operation's numbers.
        any_base: accept parents that were made on different bases.

    Raises:
        ComposeError: parents that do not fit together, values that are not finite, impossible ranks, or an empty result.
    """
    if operation not in OPERATIONS:
        raise ComposeError(f"there is no operation {operation!r}; choose from {', '.join(OPERATIONS)}")
    chosen, settings = OPERATIONS[operation], settings or OperationSettings()
    if not math.isfinite(settings.scale):
        raise ComposeError(f"scale: expected a finite number, found {settings.scale}")
    _check(chosen, parents, rank, energy, any_base)
    dependent = [parent.adapter for parent in parents if parent.adapter.method.needs_base_weights]
    if dependent and weights is None:
        raise needs_base(dependent[0])
    methods = [low_rank(adapter.method, adapter.name) for adapter in dependent if adapter.method.low_rank]
    if form == "auto":
        method = methods[0] if methods and chosen.is_sum else LoRA()
    else:
        method = LOW_RANK[form]()
    combiner = _Combiner(chosen, parents, weights, rank, energy, settings, method)
    if chosen.check is not None:
        chosen.check([parent.adapter for parent in parents], settings, combiner.most)
    tied = _tied(parents, method)
    names = combiner.sites()
    made = dict(zip(names, map_sites(combiner.stored, names), strict=True))
    tensors = {site: one for site, (one, _, _) in made.items()}
    kinds = {site: kind for site, (_, kind, _) in made.items()}
    sites = [error for _, _, error in made.values() if error is not None]
    _check_something_is_left(combiner, sites, tensors)
    adapter = assemble(tensors, kinds, name, method=method, tied=tied, parameters=target_parameters_of(parents))
    origin, left_out = origin_of(parents), len(tensors) - len(sites)
    notes = [f"nothing is left at {left_out} sites, so the new adapter does not act there"] if left_out else []
    records = {site: record for parent in reversed(parents) for site, record in base_records(parent.adapter).items()}
    return Composition(
        adapter,
        operation,
        _effective(chosen, settings, rank, energy),
        origin,
        sites,
        notes + _notes(parents, chosen) + notes_on_parents(parents) + origin.get("notes", []),
        records_for(adapter, records, weights),
        template_of(parents),
    )


@dataclass
class _Combiner:
    """One composition, site by site."""

    operation: Operation
    parents: Sequence[Parent]
    weights: Weights | None
    rank: int | None
    energy: float | None
    settings: OperationSettings
    method: LowRankMethod
    last_weight: threading.local = field(default_factory=threading.local)

    def sites(self) -> list[str]:
        """Sites of the result, in the parents' order."""
        parents = self.parents if self.operation.over == "all" else self.parents[:1]
        return list(dict.fromkeys(site for parent in parents for site in parent.adapter.tensors))

    def stored(self, site: str) -> tuple[Tensors, str, SiteError | None]:
        """(tensors of a site, its kind, their distance from the operation's result); no tensors and no distance where nothing is left."""
        exact = self.result(site)
        weight_OK = self.weight(site) if self.method.needs_base_weights else None
        tensors = site_tensors(site, self.reduced(site, exact), self.method, weight_OK)
        return tensors, exact.geometry.kind, self.measure(site, exact, tensors) if tensors else None

    def result(self, site: str) -> SiteDelta:
        """The operation's result at a site."""
        parts, weights = self._parts(site)
        delta = self.operation.function(parts, weights, SiteContext(site, self.settings, lambda: self.weight(site)))
        return delta if self.settings.scale == 1 else delta.scaled(self.settings.scale)

    def reduced(self, site: str, delta: SiteDelta) -> SiteDelta:
        """The delta in a form that can be stored: cut to the requested rank, and of some rank where it is dense."""
        if self.method.needs_base_weights and delta.dense_OK is None:
            # The gain is kept; only the factors beside it are cut.
            factors = SiteDelta(delta.geometry, delta.terms)
            if factors.rank and (self.energy is not None or (self.rank is not None and self.rank < factors.rank)):
                factors = truncated(factors, rank=self.rank, energy=self.energy)
            return SiteDelta(delta.geometry, factors.terms, delta.gain_O)
        limit = self.limit(site)
        if delta.factored and self.energy is None and delta.rank <= limit:
            return delta
        return truncated(delta, rank=limit, energy=self.energy, weight_OK=self.weight(site))

    def limit(self, site: str) -> int:
        """The requested rank; without one the sum of the parents' ranks, or with a share of energy the layer's largest rank."""
        if self.rank is not None:
            return self.rank
        acting = [parent.adapter for parent in self.parents if site in parent.adapter.tensors]
        if self.energy is not None:
            return min(MAX_RANK, geometry_of(acting[0], site).out)
        return sum(adapter.rank(site) for adapter in acting)

    def most(self, site: str) -> float:
        """The largest rank that a full-rank result can keep at a site."""
        if self.energy is not None:
            geometry = next(
                geometry_of(parent.adapter, site) for parent in self.parents if site in parent.adapter.tensors
            )
            return self.energy * min(geometry.out, geometry.fan_in)
        return MAX_RANK if self.rank is None and self.method.needs_base_weights else self.limit(site)

    def weight(self, site: str) -> Tensor | None:
        """The base weight at a site, where the base is known; each thread keeps its last one."""
        if self.weights is None:
            return None
        kept: tuple[str, Tensor] | None = getattr(self.last_weight, "kept", None)
        if kept is None or kept[0] != site:
            kept = self.last_weight.kept = (site, self.weights(site))
        return kept[1]

    def measure(self, site: str, exact: SiteDelta, tensors: Tensors) -> SiteError:
        """The distance of the stored delta from the exact one; an operation on factors is compared with the sum of the deltas."""
        if self.operation.factor_wise:
            exact = weighted_sum(*self._parts(site)).scaled(self.settings.scale)
        one = assemble({site: tensors}, {site: exact.geometry.kind}, "stored", method=self.method)
        difference = exact - site_delta(one, site, self._weights)
        norm = exact.norm(None if exact.gain_O is None else self.weight(site))
        error = difference.norm(None if difference.factored else self.weight(site))
        return SiteError(site, one.rank(site), norm, error / norm if norm else 0.0)

    def size_of_parts(self, site: str) -> float:
        """The norm of the weighted deltas together, as if they were orthogonal."""
        weight_OK = self.weight(site)
        return math.hypot(*(w * part.norm(weight_OK) for part, w in zip(*self._parts(site), strict=True)))

    def _parts(self, site: str) -> tuple[list[SiteDelta], list[float]]:
        acting = [parent for parent in self.parents if site in parent.adapter.tensors]
        # An adapter that is given twice is one value, so that it can cancel itself.
        each = {id(p.adapter): p.adapter for p in acting}
        deltas = {key: site_delta(adapter, site, self._weights) for key, adapter in each.items()}
        return [deltas[id(parent.adapter)] for parent in acting], [parent.weight for parent in acting]

    @property
    def _weights(self) -> Weights | None:
        return None if self.weights is None else self._known_weight

    def _known_weight(self, site: str) -> Tensor:
        weight = self.weight(site)
        assert weight is not None
        return weight


def _check_something_is_left(combiner: _Combiner, sites: Sequence[SiteError], tensors: Mapping[str, Tensors]) -> None:
    """Deltas that cancel leave rounding, and factors too small for fp32 leave nothing; neither must pass for an adapter."""
    if sites and all(combiner.method.changes_nothing(tensors[site.site]) for site in sites):
        raise ComposeError(
            "nothing is left: the change is smaller than fp32 can hold at every site; give larger weights"
        )
    if sites and any(parent.weight < 0 for parent in combiner.parents):
        parts = math.hypot(*(combiner.size_of_parts(site.site) for site in sites))
        if math.hypot(*(site.norm for site in sites)) < CANCELLED * parts:
            raise ComposeError("nothing is left: the changes cancel each other up to rounding")


def _check(
    operation: Operation, parents: Sequence[Parent], rank: int | None, energy: float | None, any_base: bool
) -> None:
    if not parents:
        raise ComposeError("there is nothing to compose; give at least one adapter")
    for parent in parents:
        if not math.isfinite(parent.weight):
            raise ComposeError(f'the weight of "{parent.adapter.name}" is {parent.weight}; expected a finite number')
    for adapter in {id(parent.adapter): parent.adapter for parent in parents}.values():
        check_changes_only(adapter)
        check_finite(adapter)
        if all(adapter.method.changes_nothing(tensors) for tensors in adapter.tensors.values()):
            raise ComposeError(
                f'the adapter "{adapter.name}" changes nothing: its B is zero at every site; was it trained?'
            )
    if not any_base:
        check_one_base([parent.adapter for parent in parents])
    _check_geometry(parents)
    if energy is not None and not 0 < energy <= 1:
        raise ComposeError(f"energy: expected a share above 0 and up to 1, found {energy:g}")
    if rank is not None:
        _check_rank(operation, parents, rank)


def _check_geometry(parents: Sequence[Parent]) -> None:
    problems = Problems()
    first: dict[str, tuple[str, Geometry]] = {}
    for parent in parents:
        for site in parent.adapter.tensors:
            geometry = geometry_of(parent.adapter, site)
            name, known = first.setdefault(site, (parent.adapter.name, geometry))
            if known != geometry:
                problems.add(f'{site}: {known} in "{name}", {geometry} in "{parent.adapter.name}"')
    problems.raise_if_any(ComposeError, "the adapters have layers of different shapes, so they are not of one base")


def _tied(parents: Sequence[Parent], method: Method) -> bool:
    """The embedding's delta acts on the tied head too, in every parent that has an embedding."""
    tied = {p.adapter.method.ensure_weight_tying for p in parents if "embedding" in p.adapter.kinds.values()}
    if len(tied) > 1 or (True in tied and not method.serves_tied_head):
        raise ComposeError(
            "some of these adapters act on the tied head through their embedding's factors (ensure_weight_tying) and others cannot, "
            "so one adapter cannot do the same as all of them; merge them instead (veneer merge)"
        )
    return tied == {True}


def _check_rank(operation: Operation, parents: Sequence[Parent], rank: int) -> None:
    if rank < 1:
        raise ComposeError(f"rank: expected 1 or more, found {rank}")
    most = 0
    dense = operation.dense or any(parent.adapter.method.needs_base_weights for parent in parents)
    for site in {site for parent in parents for site in parent.adapter.tensors}:
        acting = [parent.adapter for parent in parents if site in parent.adapter.tensors]
        geometry = geometry_of(acting[0], site)
        full = min(geometry.out, geometry.fan_in)
        most = max(most, full if dense else min(full, sum(adapter.rank(site) for adapter in acting)))
    if rank > most:
        raise ComposeError(f"rank {rank} is above the maximum of the result, {most}; omit --rank to keep everything")


def _effective(
    operation: Operation, settings: OperationSettings, rank: int | None, energy: float | None
) -> dict[str, Any]:
    """The settings that had an effect."""
    used: dict[str, Any] = {key: getattr(settings, key) for key in operation.options}
    if settings.scale != 1:
        used["scale"] = settings.scale
    return {**used, **{key: value for key, value in (("rank", rank), ("energy", energy)) if value is not None}}


def _notes(parents: Sequence[Parent], operation: Operation) -> list[str]:
    sets = [set(parent.adapter.tensors) for parent in parents]
    notes = []
    if operation.over == "all" and (partly := set().union(*sets) - sets[0].intersection(*sets)):
        notes.append(f"{len(partly)} sites are adapted by some of the parents only; the others count as zero there")
    if operation.factor_wise:
        notes.append("factors were added, not changes; the error is the distance from the sum of the changes")
    return notes
