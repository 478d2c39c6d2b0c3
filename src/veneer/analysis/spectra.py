"""Spectra of adapters: the size of each delta, the number of directions that it uses, and their relation to the base.

Per site, for a delta d with singular values s_1 >= s_2 >= ... and the base weight W:

    stable rank       ||d||_F^2 / s_1^2
    effective rank    exp(-sum p log p), p = s / sum s                      (Roy and Vetterli 2007)
    ratio             ||d||_F / ||W||_F
    amplification     ||d||_F / ||U^T W V||_F, U and V the leading r singular vectors of d, r the adapter's rank: the delta's size in its
                      directions against the base's there                     (LoRA, arXiv 2106.09685, section 7.3)
    magnitude change  mean over outputs of | ||W'_o|| - ||W_o|| |
    direction change  mean over outputs of 1 - cos(W'_o, W_o)               (DoRA, arXiv 2402.09353, section 3)

Across sites, magnitude and direction change correlate in LoRA fine-tunes and not in full fine-tunes. Everything is returned as plain
data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.analysis.intruders import Intruders, find_intruders
from veneer.analysis.subspace import Subspaces, subspaces
from veneer.checkpoints.receipt import receipt_of, trained_tokens
from veneer.deltas.delta import SiteDelta, Weights, site_delta
from veneer.deltas.parallel import map_sites
from veneer.deltas.svd import inner_product, nonzero, spectrum_of, svd_of

SAME_SEED = (
    "Both adapters were initialised from one seed, so their A factors started equal: the overlap of input directions is the seed's and "
    "not learnt. Compare output directions and cosine."
)
"""The note on the overlap of two adapters of one seed."""
Compare = Callable[["SiteSpectrum", SiteDelta, Tensor, tuple[Tensor, Tensor]], tuple["SiteSpectrum", tuple[float, ...]]]
"""Adds the values that compare with the base weight, given the delta's singular vectors; also returns the relative magnitude changes."""
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)$")
_EXPERT = re.compile(r"\bexperts\.(\d+)\b")


@dataclass(frozen=True)
class SiteSpectrum:
    """One site. block and module: its position ("model.layers.3.mlp.up_proj" -> 3, "mlp.up_proj"). Values that need the base are None
    without it."""

    site: str
    block: int | None
    module: str
    rank: int
    singular_values: tuple[float, ...]
    norm: float
    stable_rank: float
    effective_rank: float
    ratio: float | None = None
    amplification: float | None = None
    magnitude_change: float | None = None
    direction_change: float | None = None
    intruders: Intruders | None = None
    expert: int | None = None
    """Number of the expert that the site belongs to."""


@dataclass(frozen=True)
class AdapterSpectra:
    """All sites of an adapter, their summary, and their overlap with another adapter's."""

    name: str
    method: str
    sites: tuple[SiteSpectrum, ...]
    correlation: float | None = None
    against: str | None = None
    subspaces: dict[str, Subspaces] = field(default_factory=dict)
    one_seed: bool = False
    """Both adapters were initialised from one seed, so their input directions overlap from the start."""
    magnitudes: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Relative magnitude change of each output, ||W'_o|| / ||W_o|| - 1, by site."""
    expert_tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Number of tokens that each expert of a stack was trained on, by the stack's name."""

    @property
    def intruders(self) -> int | None:
        """Number of intruder dimensions over all sites; None without the base."""
        counts = [site.intruders.count for site in self.sites if site.intruders is not None]
        return sum(counts) if counts else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the magnitudes of every output."""
        sites = [{**vars(site), "intruders": site.intruders and vars(site.intruders)} for site in self.sites]
        pairs = {site: vars(pair) for site, pair in self.subspaces.items()}
        found = {**vars(self), "sites": sites, "subspaces": pairs, "intruders": self.intruders}
        del found["magnitudes"]
        return found


def adapter_spectra(
    adapter: Adapter,
    weights: Weights | None = None,
    *,
    against: Adapter | None = None,
    against_base: bool = True,
    top_k: int = 10,
    threshold: float = 0.5,
) -> AdapterSpectra:
    """Compute the spectra of an adapter.

    Args:
        adapter: the adapter.
        weights: the base's weights; without them the values that compare with the base are None.
        against_base: compute these values. They cost as much as the rest, which needs the weights too if the delta depends on them.
        against: another adapter, whose subspaces are compared at the sites that both have.
        top_k: number of leading directions that are checked for intruders.
        threshold: cosine below which a direction is an intruder.

    Raises:
        ComposeError: the delta depends on the base weights and ``weights`` is not given.
    """
    compare = partial(_against_base, top_k=top_k, threshold=threshold) if weights is not None and against_base else None
    work = partial(_site, adapter=adapter, weights=weights, against=against, compare=compare)
    found = dict(zip(adapter.tensors, map_sites(work, list(adapter.tensors)), strict=True))
    sites = [spectrum for spectrum, _, _ in found.values()]
    pairs = {site: overlap for site, (_, _, overlap) in found.items() if overlap is not None}
    magnitudes = {site: relative for site, (_, relative, _) in found.items() if relative is not None}
    return AdapterSpectra(
        adapter.name,
        adapter.method.name,
        tuple(sites),
        _correlation(sites),
        None if against is None else against.name,
        pairs,
        against is not None and _one_seed(adapter, against),
        magnitudes,
        trained_tokens(adapter),
    )


def _site(
    site: str, *, adapter: Adapter, weights: Weights | None, against: Adapter | None, compare: Compare | None
) -> tuple[SiteSpectrum, tuple[float, ...] | None, Subspaces | None]:
    """One site: its spectrum, the relative magnitude change of each output, and the overlap with the other adapter."""
    weight_OK = None if weights is None else weights(site).double()
    delta = _resolved(adapter, site, weight_OK)
    u, s, vt = spectrum_of(delta, weight_OK, adapter.rank(site))
    keep = min(int(nonzero(s).sum()), u.shape[1])
    spectrum, relative, overlap = _spectrum(site, delta, s), None, None
    if weight_OK is not None and compare is not None:
        spectrum, relative = compare(spectrum, delta, weight_OK, (u[:, :keep], vt[:keep]))
    if against is not None and site in against.tensors:
        other = _resolved(against, site, weight_OK)
        leading = svd_of(other, weight_OK, against.rank(site))
        size = spectrum.norm * other.norm()
        cosine = inner_product(delta, other) / size if size else 0.0
        overlap = subspaces((u, s, vt), leading, cosine)
    return spectrum, relative, overlap


def _resolved(adapter: Adapter, site: str, weight_OK: Tensor | None) -> SiteDelta:
    """A site's delta in a form that no longer depends on the base weight: factors, or one matrix."""
    delta = site_delta(adapter, site, None if weight_OK is None else lambda _: weight_OK)
    return delta if delta.factored else SiteDelta(delta.geometry, dense_OK=delta.dense(weight_OK))


def stable_rank(s: Tensor) -> float:
    """||d||_F^2 / s_1^2; 0 for no change."""
    return float(s.square().sum() / s.max().square()) if bool(nonzero(s).any()) else 0.0


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the normalised singular values; 0 for no change."""
    some = s[nonzero(s)]
    if not len(some):
        return 0.0
    p = some / some.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def amplification(norm: float, weight_OK: Tensor, u: Tensor, vt: Tensor) -> float:
    """||d||_F / ||U^T W V||_F; infinite where the base is zero in the delta's directions."""
    base = float((u.T @ weight_OK @ vt.T).norm())
    return norm / base if base else math.inf


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of two lists; None where it is not defined."""
    if len(x) < 3:
        return None
    a = torch.tensor(x, dtype=torch.float64)
    b = torch.tensor(y, dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else None


def position_of(site: str) -> tuple[int | None, str]:
    """(block, module) of a site: the first number in its path and the rest after it, the same for all experts of a block."""
    found = _BLOCK.search(site)
    return (int(found[1]), _EXPERT.sub("experts.*", found[2])) if found else (None, site)


def _spectrum(site: str, delta: SiteDelta, s: Tensor) -> SiteSpectrum:
    block, module = position_of(site)
    values = tuple(float(f"{value:.6g}") for value in s[nonzero(s)].tolist())
    rank = delta.rank if delta.factored else len(values)
    number = _EXPERT.search(site)
    expert = None if number is None else int(number[1])
    norm = float(s.norm())
    return SiteSpectrum(site, block, module, rank, values, norm, stable_rank(s), effective_rank(s), expert=expert)


def _against_base(
    spectrum: SiteSpectrum,
    delta: SiteDelta,
    weight_OK: Tensor,
    directions: tuple[Tensor, Tensor],
    *,
    top_k: int,
    threshold: float,
) -> tuple[SiteSpectrum, tuple[float, ...]]:
    tuned_OK = weight_OK + delta.dense(weight_OK)
    before, after = weight_OK.norm(dim=1), tuned_OK.norm(dim=1)
    cosine = (weight_OK * tuned_OK).sum(1) / (before * after).clamp_min(1e-300)
    size = float(before.norm())
    found = replace(
        spectrum,
        ratio=spectrum.norm / size if size else math.inf,
        amplification=amplification(spectrum.norm, weight_OK, *directions),
        magnitude_change=float((after - before).abs().mean()),
        direction_change=float((1 - cosine).mean()),
        intruders=find_intruders(weight_OK, tuned_OK, top_k=top_k, threshold=threshold),
    )
    relative = (after / before.clamp_min(1e-300) - 1).tolist()
    return found, tuple(relative)


def _correlation(sites: Sequence[SiteSpectrum]) -> float | None:
    pairs = [
        (site.direction_change, site.magnitude_change)
        for site in sites
        if site.direction_change is not None and site.magnitude_change is not None
    ]
    return pearson([d for d, _ in pairs], [m for _, m in pairs])


def _one_seed(one: Adapter, other: Adapter) -> bool:
    """Two different adapters record one seed for their initial values."""
    seeds = [receipt_of(adapter).get("seed") for adapter in (one, other)]
    return one is not other and seeds[0] is not None and seeds[0] == seeds[1]


def mean_text(values: Sequence[float | None]) -> str:
    """The mean of the values that are known, as text."""
    known = [value for value in values if value is not None]
    return short_text(math.fsum(known) / len(known)) if known else "-"


def short_text(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.3g}"
