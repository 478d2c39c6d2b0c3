"""An adapter from two sets of full weights: the best approximation of a fine-tune's delta, of a given rank at every site.

    LoRA    W_t - W                ~  B A                       Eckart and Young: the rank-r optimum
    DoRA    W_t - W                ~  diag(g) W + B A           the two parts fitted in turn

For DoRA the gain is least squares given the factors, g_o = <(d - B A)_o, W_o> / ||W_o||^2, and the factors are the rank-r optimum given
the gain. Each turn lowers the error. The first gain is the one that fits the whole delta, and the delta of a DoRA adapter comes back
exactly after a few turns. Where that ends above the LoRA optimum, fitting starts again from a gain of zero, so at the same rank a DoRA
extraction is never worse. Magnitudes follow from gain and factors.

Sites are read from both folders one by one; neither model is ever in memory as a whole. Tensors that differ and are not a site of the
adapter (norms, embeddings unless targeted) are reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.methods import LOW_RANK, LoRA, LowRankMethod
from veneer.checkpoints.base_files import Skeleton
from veneer.checkpoints.peft.portable import as_parameters, not_portable
from veneer.deltas.build import MAX_RANK, Tensors, assemble, site_tensors
from veneer.deltas.delta import SiteDelta
from veneer.deltas.linalg import Svd, dense_svd
from veneer.deltas.parents import records_for, records_of
from veneer.deltas.svd import from_svd, nonzero, rank_for
from veneer.errors import ComposeError, Problems

_TURNS, _MORE = 30, 8


@dataclass(frozen=True)
class SiteExtract:
    """One site: its rank, ||W_t - W||_F and the ratio to ||W||_F, the kept share of ||d||_F^2, and the largest singular values."""

    site: str
    rank: int
    norm: float
    ratio: float
    kept: float
    singular_values: tuple[float, ...]


@dataclass
class Extraction:
    """The adapter and the share of the delta that it holds. outside: tensors that differ and that it cannot hold, with their ||d||."""

    adapter: Adapter
    sites: list[SiteExtract]
    outside: dict[str, float] = field(default_factory=dict)
    base_entries: dict[str, Any] = field(default_factory=dict)
    """The receipt's entries about the base."""
    made_by: dict[str, Any] = field(default_factory=dict)
    unlike: list[str] = field(default_factory=list)
    """Tensors that one model lacks or has in another shape."""

    @property
    def kept(self) -> float:
        """The share of ||d||^2 that the adapter holds, over its sites."""
        total = math.fsum(site.norm**2 for site in self.sites)
        return math.fsum(site.kept * site.norm**2 for site in self.sites) / total if total else 1.0

    @property
    def outside_share(self) -> float:
        """The share of ||d||^2, over all tensors, outside its sites."""
        lost = math.fsum(norm**2 for norm in self.outside.values())
        total = lost + math.fsum(site.norm**2 for site in self.sites)
        return lost / total if total else 0.0

    def receipt(self) -> dict[str, Any]:
        """The folder's receipt of its origin."""
        return {"made_by": {**self.made_by, "kept": float(f"{self.kept:.6g}")}, **self.base_entries}

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "made_by": self.made_by,
            "method": self.adapter.method.name,
            "parameters": self.adapter.num_parameters(),
            "kept": self.kept,
            "outside_share": self.outside_share,
            "outside": self.outside,
            "unlike": self.unlike,
            "sites": [asdict(site) for site in self.sites],
        }


def extract(
    base: Skeleton,
    tuned: Skeleton,
    *,
    name: str = "extracted",
    rank: int | None = None,
    energy: float | None = None,
    method: Literal["lora", "dora"] = "lora",
    target_modules: str | Sequence[str] = "all-linear",
    device: torch.device | str = "cpu",
) -> Extraction:
    """Extract the difference of ``tuned`` and ``base`` as an adapter.

    Args:
        base: the base model's files.
        tuned: the fine-tuned model's files.
        name: the new adapter's name.
        rank: the largest rank at every site.
        energy: keep the least rank with this share of ||d||^2 (for DoRA: of the part that the gain leaves).
        method: the form of the adapter.
        target_modules: sites, as for training.
        device: where the differences are decomposed, in fp64.

    Raises:
        ComposeError: models that do not match, weights that are not finite, impossible ranks, or models without a difference.
    """
    _check_request(rank, energy)
    targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    options = LoRA(target_modules=targets)
    form = LOW_RANK[method]()
    left_out = [site for site in not_portable(base.model, base.sites, form) if base.sites[site].stack is None]
    sites = options.choose(base.survey, left_out=left_out)
    _check_match(base, tuned, sites)
    tensors: dict[str, Tensors] = {}
    found: list[SiteExtract] = []
    for site in sites:
        tensors[site], entry = _site(base, tuned, site, rank, energy, form, torch.device(device))
        if tensors[site]:
            found.append(entry)
    outside, unlike = _outside(base, tuned, list(sites))
    if not found:
        more = (
            f"; only {', '.join(list(outside)[:3])} differ, and these are not sites of this adapter" if outside else ""
        )
        raise ComposeError(
            f"there is nothing to extract: both models have the same weights at all {len(sites)} sites{more}"
        )
    kinds = {site: base.sites[site].kind for site in sites}
    parameters = [f"{site}.weight" for site in as_parameters(base.model, {site: base.sites[site] for site in sites})]
    adapter = assemble(tensors, kinds, name, method=form, parameters=parameters)
    entries = records_for(adapter, records_of(base, adapter.tensors), base.weight_2d)
    request = {"rank": rank} if rank is not None else {"energy": energy}
    return Extraction(adapter, found, outside, entries, {"operation": "extract", **request}, unlike)


def _site(
    base: Skeleton,
    tuned: Skeleton,
    site: str,
    rank: int | None,
    energy: float | None,
    method: LowRankMethod,
    device: torch.device,
) -> tuple[Tensors, SiteExtract]:
    weight_OK = base.weight_2d(site).to(device).double()
    change = tuned.weight_2d(site).to(device).double() - weight_OK
    if not bool(torch.isfinite(change).all()):
        raise ComposeError(f"{site}: the weights hold values that are not finite")
    norm, size = float(change.norm()), float(weight_OK.norm())
    gain_O, rest = None, change
    if method.needs_base_weights and norm:
        gain_O = _fitted_gain(change, weight_OK, rank)
        rest = change - gain_O.unsqueeze(1) * weight_OK
    lost = float(rest.square().sum())
    u, s, vt = (t.cpu() for t in _leading(rest, rank, energy))
    weight_OK, gain_O = weight_OK.cpu(), None if gain_O is None else gain_O.cpu()
    like = SiteDelta(base.sites[site].geometry)
    cut = SiteDelta(like.geometry, from_svd(like, u, s, vt).terms if len(s) else (), gain_O)
    tensors = site_tensors(site, cut, method, weight_OK) if norm else {}
    lost = max(0.0, lost - float(s.square().sum()))
    kept = 1 - lost / norm**2 if norm else 1.0
    values = tuple(float(f"{value:.6g}") for value in s.tolist())
    # a gain alone is stored with factors of rank one that do nothing
    rank = max(len(s), 1) if tensors else 0
    return tensors, SiteExtract(site, rank, norm, norm / size if size else math.inf, kept, values)


def _fitted_gain(change: Tensor, weight_OK: Tensor, rank: int | None) -> Tensor:
    """The gain that fits best beside factors of a rank, [O]; rank 16 where a share of energy chooses the rank."""
    rank = min(16 if rank is None else rank, *change.shape)
    squared = weight_OK.square().sum(1).clamp_min(1e-300)
    gain_O, error = _turns(change, weight_OK, (change * weight_OK).sum(1) / squared, rank)
    singular = dense_svd(change, rank)[1]
    without = math.sqrt(max(0.0, float(change.square().sum() - singular.square().sum())))
    return gain_O if error <= without else _turns(change, weight_OK, torch.zeros_like(squared), rank)[0]


def _turns(change: Tensor, weight_OK: Tensor, gain_O: Tensor, rank: int) -> tuple[Tensor, float]:
    """Fit gain and factors in turn from a first gain: (the gain, the remaining error).

    Factors follow by one step of subspace iteration a turn, with a few directions more than the rank.
    """
    squared = weight_OK.square().sum(1).clamp_min(1e-300)
    right = dense_svd(change - gain_O.unsqueeze(1) * weight_OK, rank + _MORE)[2].T
    error = math.inf
    for _ in range(_TURNS):
        rest = change - gain_O.unsqueeze(1) * weight_OK
        left = torch.linalg.qr(rest @ right).Q
        u, s, vt = torch.linalg.svd(left.T @ rest, full_matrices=False)
        right = vt.T
        beyond = change - (left @ (u[:, :rank] * s[:rank])) @ vt[:rank]
        gain_O = (beyond * weight_OK).sum(1) / squared
        before, error = error, float((beyond - gain_O.unsqueeze(1) * weight_OK).norm())
        if error > before * (1 - 1e-4) or error < 1e-12 * float(change.norm()):
            break
    return gain_O, error


def _leading(rest: Tensor, rank: int | None, energy: float | None) -> Svd:
    """The singular triples to keep. For a share of energy the rank is doubled until it holds enough."""
    full = min(rest.shape)
    if energy is None:
        assert rank is not None
        u, s, vt = dense_svd(rest, min(rank, full))
        keep = int(nonzero(s).sum())
        return u[:, :keep], s[:keep], vt[:keep]
    total, ask = float(rest.square().sum()), min(full, 64)
    while True:
        u, s, vt = dense_svd(rest, ask)
        if ask == full or float(s.square().sum()) >= energy * total:
            break
        ask = min(full, 4 * ask)
    if not total:
        return u[:, :0], s[:0], vt[:0]
    # The values that were not computed count as one more, so the share is of the total.
    padded = torch.cat([s, s.new_tensor([math.sqrt(max(0.0, total - float(s.square().sum())))])])
    keep = min(rank_for(padded, energy), int(nonzero(s).sum()), MAX_RANK)
    return u[:, :keep], s[:keep], vt[:keep]


def _check_request(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ComposeError("expected either a rank or a share of energy to keep; give one of them")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ComposeError(f"rank: expected 1 to {MAX_RANK}, found {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ComposeError(f"energy: expected a share above 0 and up to 1, found {energy:g}")


def _check_match(base: Skeleton, tuned: Skeleton, sites: Sequence[str]) -> None:
    problems = Problems()
    for site in sites:
        other = tuned.sites.get(site)
        if other is None:
            problems.add(f"{site} is in the base and not in the fine-tuned model")
        elif other.geometry != base.sites[site].geometry:
            problems.add(f"{site}: {base.sites[site].geometry} in the base, {other.geometry} in the fine-tuned model")
    problems.raise_if_any(
        ComposeError,
        f"{tuned.folder.path} is not a fine-tuned copy of {base.folder.path}: their layers differ",
        limit=5,
    )


def _outside(base: Skeleton, tuned: Skeleton, sites: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Tensors that differ outside the adapter's sites, with the norm of the difference, largest first; and those that cannot be compared,
    because one model lacks them or has them in another shape."""
    found: dict[str, float] = {}
    unlike: list[str] = []
    done = {(base.key(site), tuned.key(site)) for site in sites}
    names = dict.fromkeys([*base.names, *tuned.names])
    pairs = [(base.parameter_key(name), tuned.parameter_key(name)) for name in names]
    # tensors that are in both files and in neither model (tables that are computed while loading)
    pairs += [(key, key) for key in base.folder.files if key in tuned.folder.files and key not in base.names.values()]
    for key, other in pairs:
        if (key, other) in done:
            continue
        if key is None or other is None or base.folder.shape(key) != tuned.folder.shape(other):
            unlike.append(key or other or "")
        elif (norm := _distance(base.folder.get(key), tuned.folder.get(other), other)) > 0:
            found[key] = norm
        if key is not None and other is not None:
            done.add((key, other))
    return dict(sorted(found.items(), key=lambda item: -item[1])), unlike


def _distance(one: Tensor, other: Tensor, name: str) -> float:
    if not one.is_floating_point():
        return 0.0
    norm = float((other.double() - one.double()).norm())
    if not math.isfinite(norm):
        raise ComposeError(f"{name}: the tensor, or the base's, holds values that are not finite")
    return norm
